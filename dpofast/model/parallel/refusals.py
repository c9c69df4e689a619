"""What a model computes for a batch whose rows are split over several processes, and what it refuses there."""

from __future__ import annotations

from typing import Any

from dpofast.model.checks.support import is_recurrent
from dpofast.model.dropout import active_dropout
from dpofast.model.rope import depends_on_length, longest_sequence
from dpofast.packing.batch import PackedBatch


def check_split_call(model: Any, batch: PackedBatch, *, padded: bool, counts_routing: bool) -> None:
    """Check that model(packed=batch) can compute a batch of which this process has some rows.

    Args:
        model: the attached causal language model.
        batch: with a split.
        padded: whether the model runs over padded rows.
        counts_routing: whether the call computes a load-balancing loss, or the counts for one.

    Raises:
        ValueError: it cannot.
    """
    name = type(model).__name__
    if padded:
        raise ValueError(
            "split_over: expected packed rows, which attention exchanges between processes, and the model runs over "
            "padded ones: detach the head and attach it without padded=True"
        )
    if counts_routing:
        raise ValueError(
            "balance: a load-balancing loss counts the tokens of whole rows, of which each process of split_over has "
            "a part: train without it (router_aux_loss_coef=0)"
        )
    if batch.media is not None:
        raise ValueError(
            "split_over: expected text alone, as images go to rows that other processes have, got a batch with images: "
            "train on images without sequence parallelism"
        )
    if is_recurrent(model):
        raise ValueError(
            f"{name}: recurrent layers need all rows one after the other, of which each process of split_over has "
            "every k-th: train hybrids without sequence parallelism, and large ones with FSDP2"
        )
    longest = longest_sequence(batch)
    if depends_on_length(model, longest):
        raise ValueError(
            f"{name}: a sequence of {longest} tokens is so long that the rotary table depends on its length, which is "
            "not supported where rows are split over processes: cut the data to a smaller max_length, or set another "
            "rope_parameters in the config (YaRN has one table for all lengths)"
        )
    if model.training and (rates := active_dropout(model)):
        raise ValueError(
            f"{name}: expected a model without dropout where rows are split over processes, which draw alike for "
            f"different rows, got {rates}: set the rates to 0"
        )
