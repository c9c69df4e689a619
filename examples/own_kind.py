"""A loss of your own in DPOTrainer: here a squared hinge on log-ratios per token, for pairs; another one for lists.

    python examples/own_kind.py
    dpofast train --loss_type own_kind:squared_hinge --model MODEL --data DATA --output_dir OUT     (in this folder)

examples: token-level pairs, mappings with prompt_ids, chosen_ids and rejected_ids.
"""

import torch
from datasets import Dataset

from dpofast import DPOConfig, DPOTrainer, Lists, LossOptions, Pairs, preference_kind


@preference_kind(lengths=True)
def squared_hinge(pairs: Pairs, loss: LossOptions) -> torch.Tensor:
    """relu(1 - beta * (w / n_w - l / n_l))^2 of log-ratios w, l and lengths n: (P,), one number a pair, no mean."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return torch.relu(1 - pairs.beta * (chosen - rejected)).square()


@preference_kind(lists=True)
def best_of_list(lists: Lists, loss: LossOptions) -> torch.Tensor:
    """-log softmax(rewards) of the best response, the first one: (P,). Places where a list has ended are left out."""
    return -torch.where(lists.member, lists.rewards, -torch.inf).log_softmax(1)[:, 0]


def train(model, tokenizer, examples, folder, *, loss=squared_hinge, **options):
    """Train on the examples; the loss of every step."""
    args = DPOConfig(output_dir=folder, loss_type=[loss], **options)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(examples), processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    import tempfile

    from tiny import tiny_examples, tiny_model, tiny_tokenizer, trainer_options

    with tempfile.TemporaryDirectory() as folder:
        print(train(tiny_model(), tiny_tokenizer(), tiny_examples(), folder, **trainer_options()))
