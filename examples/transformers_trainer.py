"""A subclass of transformers.Trainer, whose compute_loss is packed.

    python examples/transformers_trainer.py

train_dataset: rows with prompt_ids, chosen_ids and rejected_ids.
"""

import torch
from transformers import Trainer, TrainingArguments

from dpofast import PreferenceLoss, attach_logprob_head, pack, preference_loss, sequence_logprobs


class PreferenceTrainer(Trainer):
    """Trains on packed pairs; TrainingArguments need remove_unused_columns=False."""

    def __init__(self, model, ref_model, args, train_dataset, **options):
        super().__init__(attach_logprob_head(model), args, self.collate, train_dataset, **options)
        self.ref_model = attach_logprob_head(ref_model).eval().to(args.device)

    @staticmethod
    def collate(examples):
        (batch,) = pack(examples)
        return {"packed": batch}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["packed"]
        logps = sequence_logprobs(model(packed=batch), batch)
        with torch.no_grad():
            ref_logps = sequence_logprobs(self.ref_model(packed=batch), batch)
        loss = PreferenceLoss(beta=0.1)
        output = preference_loss(logps, batch.pairs, ref_logps, loss=loss, columns=batch.columns)
        return (output.loss, output) if return_outputs else output.loss


def train(model, ref_model, dataset, args):
    """Trains as the TrainingArguments say; the losses that were logged."""
    trainer = PreferenceTrainer(model, ref_model, args, dataset)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    import tempfile

    from datasets import Dataset
    from tiny import tiny_examples, tiny_model, trainer_options

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, remove_unused_columns=False, **trainer_options())
        print(train(tiny_model(), tiny_model(), Dataset.from_list(tiny_examples()), args))
