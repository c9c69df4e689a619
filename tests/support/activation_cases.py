"""Bytes that a forward of a long pair keeps for its backward, of one process or of a rank that has some of its rows."""

import random

import torch

from bench.cost import Cost
from dpofast import PackedPreference, PreferenceLoss, attach_logprob_head, pack
from tests.support.rank_processes import become_rank
from tests.support.tiny import VOCAB, tiny_model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def long_pair(prompt, responses):
    """One pair whose packed row has prompt + 2 · responses positions."""
    draw = random.Random(0)
    lengths = {"prompt_ids": prompt, "chosen_ids": responses, "rejected_ids": responses + 2}
    pair = {name: [draw.randrange(3, VOCAB) for _ in range(length)] for name, length in lengths.items()}
    return [{**pair, "rejected_ids": [*pair["rejected_ids"][:0], *pair["rejected_ids"]]}]


def measured(prompt, responses, *, checkpointing=False, group=None):
    """Bytes alive after the forward of a pair, most bytes alive at once, the loss, and gradients by name."""
    model = attach_logprob_head(tiny_model(**SHAPE)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (batch,) = pack(long_pair(prompt, responses))
    batch = batch if group is None else batch.split_over(group)
    preference = PackedPreference(torch.tensor([-10.0, -12.0]), PreferenceLoss(), num_pairs=1)
    with Cost() as cost:
        loss = model(packed=batch, preference=preference).loss
        kept = cost.live_bytes
        loss.backward()
    return {
        "rows": batch.num_tokens,
        "kept": kept,
        "peak": cost.peak_bytes,
        "loss": loss.detach(),
        "gradients": {name: weight.grad for name, weight in model.named_parameters()},
    }


def rank_main(rank, port, folder, world, prompt, responses):
    """Measure on this rank, without and with gradient checkpointing, and write it to a file."""
    become_rank(rank, world, port)
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    runs = {c: measured(prompt, responses, checkpointing=c, group=group) for c in (False, True)}
    torch.save(runs, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
