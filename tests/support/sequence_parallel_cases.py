"""Calls of a model on a batch whose rows are split over ranks, beside the same calls on one process."""

import torch

from dpofast import attach_logprob_head, pack
from tests.support.families import family_model
from tests.support.rank_processes import become_rank
from tests.support.tiny import tiny_dialogues

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def attached(family, *, heads=4, keys=None, checkpointing=None):
    """A tiny model with its head attached, in train mode; checkpointing: None, or whether it is reentrant."""
    model = attach_logprob_head(family_model(family)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model


def packed(rows, group=None, **options):
    (batch,) = pack(rows, **options)
    return batch if group is None else batch.split_over(group)


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def scored(model, batch):
    """Log-probs with statistics, and the gradients of a loss that weights every token otherwise."""
    output = model(packed=batch, stats=STATS)
    upstream = torch.linspace(-1, 1, batch.num_targets)
    (output.logps * upstream).sum().backward()
    values = {name: getattr(output, name).detach() for name in ("logps", *STATS)}
    return values, gradients(model)


def rank_main(rank, port, folder, world):
    become_rank(rank, world, port)
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    for family in ("llama",):
        rows = tiny_dialogues()
        one = scored(attached(family), packed(rows))
        ours = scored(attached(family), packed(rows, group))
        for name, value in one[0].items():
            torch.testing.assert_close(ours[0][name], value, atol=1e-5, rtol=1e-5, msg=name)
        for name, value in one[1].items():
            summed = ours[1][name]
            torch.distributed.all_reduce(summed)
            torch.testing.assert_close(summed, value, atol=1e-5, rtol=1e-5, msg=name)
        print(rank, family, "ok")
    torch.distributed.destroy_process_group()
