"""make_engine: the LM-head engine of a call, planned inside max_logits_bytes."""

from __future__ import annotations

from dataclasses import replace

from dpofast.common.backend import uses_triton
from dpofast.common.tuning.table import HeadCall, fused_is_faster
from dpofast.head.engine.interface import HeadEngine, HeadInputs, Needs
from dpofast.head.engine.row_engine import RowEngine
from dpofast.head.engine.tiled_engine import TiledEngine
from dpofast.head.planning.plan import HeadPlan, TilePlan, default_logits_bytes


def make_engine(
    inputs: HeadInputs,
    backend: str,
    max_logits_bytes: int | None,
    *,
    needs: Needs,
    largest: int | None = None,
    with_stats: bool = True,
) -> HeadEngine:
    """The engine for a chosen backend: TiledEngine for "torch", RowEngine for the others.

    "auto" is "fused" where the tuned table says that it is faster (common/tuning/table.py), else "triton". That is
    decided here, where torch.compile does not trace. Statistics need the logits, so with them "fused" works as
    "triton" does.

    Args:
        inputs: the call's tensors and options.
        backend: what choose_backend returned, but "reference".
        max_logits_bytes: the budget of the plan, None for the device's default.
        needs: which gradients the call needs. Where the head trains, rows of E are kept for it.
        largest: the most rows that must be kept at the same time, None for all.
        with_stats: False in backward, which needs forward's plan, made with the statistics, and not their values.

    Raises:
        ValueError: the budget does not hold a single row.
    """
    rows, weight = len(inputs.targets), inputs.weight
    most = default_logits_bytes(weight.device) if max_logits_bytes is None else max_logits_bytes
    run = inputs if with_stats else replace(inputs, options=replace(inputs.options, stats=()))
    if uses_triton(backend):
        fused = not inputs.options.stats and (backend == "fused" or (backend == "auto" and _tuned(inputs, needs)))
        plan = HeadPlan.make(rows, weight, most, keep=needs.trains, largest=largest, fused=fused)
        return RowEngine(run, plan, fused=fused)
    return TiledEngine(run, TilePlan.make(rows, weight, most, inputs.options, keep=needs.trains, largest=largest))


def _tuned(inputs: HeadInputs, needs: Needs) -> bool:
    mode = "trained" if needs.trains else "frozen" if needs.hidden else "forward"
    (vocab, width), dtype = inputs.weight.shape, str(inputs.weight.dtype).removeprefix("torch.")
    return fused_is_faster(HeadCall(mode, len(inputs.targets), width, vocab, dtype), inputs.weight.device)
