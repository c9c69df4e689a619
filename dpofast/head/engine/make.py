"""make_engine: the LM-head engine of a call, planned inside max_logits_bytes."""

from __future__ import annotations

from dataclasses import replace

from dpofast.common.backend import uses_triton
from dpofast.head.engine.interface import HeadEngine, HeadInputs
from dpofast.head.engine.plan import HeadPlan, TilePlan, default_logits_bytes
from dpofast.head.engine.row_engine import RowEngine
from dpofast.head.engine.tiled_engine import TiledEngine


def make_engine(
    inputs: HeadInputs,
    backend: str,
    max_logits_bytes: int | None,
    *,
    keep: bool,
    largest: int | None = None,
    with_stats: bool = True,
) -> HeadEngine:
    """The engine for a chosen backend: RowEngine for "triton" and "fused", TiledEngine for "torch".

    Args:
        inputs: the call's tensors and options.
        backend: what choose_backend returned, but "reference".
        max_logits_bytes: the budget of the plan, None for the device's default.
        keep: the head trains, so rows of E are kept for it.
        largest: the most rows that must be kept at the same time, None for all.
        with_stats: False in backward, which needs forward's plan, made with the statistics, and not their values.

    Raises:
        ValueError: the budget does not hold a single row.
    """
    rows, weight = len(inputs.targets), inputs.weight
    most = default_logits_bytes(weight.device) if max_logits_bytes is None else max_logits_bytes
    run = inputs if with_stats else replace(inputs, options=replace(inputs.options, stats=()))
    if uses_triton(backend):
        return RowEngine(run, HeadPlan.make(rows, weight, most, keep=keep, largest=largest), backend)
    return TiledEngine(run, TilePlan.make(rows, weight, most, inputs.options, keep=keep, largest=largest))
