"""DPOTrainer on tiny pairs, the results that tests read of a run, and the plain padded loop that it must equal."""

import torch

from dpofast import DPOConfig, DPOTrainer, reference
from tests.support.tiny import tiny_dataset, tiny_model, tiny_tokenizer

# What a run that writes checkpoints every second step is told.
SAVING = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}


def make_trainer(output_dir, *, model=None, train=None, evaluation=None, ref_model=None, peft_config=None, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DPOTrainer(
        tiny_model() if model is None else model,
        ref_model=ref_model,
        args=DPOConfig(output_dir=str(output_dir), **{**defaults, **options}),
        train_dataset=tiny_dataset() if train is None else train,
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def padded_training(examples, batch_size, beta=0.1, lr=1e-2):
    """Train DPO in a plain loop over padded rows in the given order. Returns losses and final weights."""
    policy, ref = tiny_model(), tiny_model()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        rows = [(e["prompt_ids"], e[side]) for e in batch for side in ("chosen_ids", "rejected_ids")]
        cu = torch.tensor([0, *torch.tensor([len(response) for _, response in rows]).cumsum(0)])
        padded = reference.padded_rows(rows)
        logps = reference.sequence_logprobs(reference.padded_logprobs(policy, **padded), cu)
        with torch.no_grad():
            ref_logps = reference.sequence_logprobs(reference.padded_logprobs(ref, **padded), cu)
        pairs = torch.arange(len(rows)).view(-1, 2)
        loss = reference.sigmoid_loss(logps, pairs, ref_logps, beta=beta)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in policy.parameters()])


def fails_in_training(model):
    """The model, whose forward raises RuntimeError in train mode."""

    def broken(module, args, kwargs):
        if module.training:
            raise RuntimeError("shapes do not match")

    model.register_forward_pre_hook(broken, with_kwargs=True)
    return model
