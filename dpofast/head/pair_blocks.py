"""Losses and gradients of known pairs, one block of sequences at a time, so that no row of the head is computed twice.

The pairs say which sequences a loss couples. E of a few whole components of the pair graph is kept; their coefficients
follow at once, and their rows are added to dh, dW and db before the next components come: 3 GEMMs in units of 2·N·D·V
for a trained head, 2 for a frozen one, 1 without gradients. Of a component that is longer than the kept rows, the
remaining rows are computed again. A coupled loss (losses/kinds.py) makes one component of the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpofast.common.backend import uses_triton
from dpofast.head.engine.interface import (
    Gradients,
    HeadEngine,
    HeadInputs,
    Needs,
    RowResult,
    concatenate,
    row_coefficients,
)
from dpofast.head.engine.make import make_engine
from dpofast.head.engine.passes import accumulate, keep_and_recompute
from dpofast.head.engine.rows import scale_rows
from dpofast.head.engine.sharded_engine import ShardedEngine, VocabShard
from dpofast.head.options import LogitOptions
from dpofast.losses.coefficients import PairTerms, pair_terms
from dpofast.losses.columns import PreferenceColumns
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.pairs import StepTotals
from dpofast.losses.sequences import Tokens, side_indices


@dataclass(frozen=True)
class PairCall:
    """One call but the head's float tensors: targets, pairs and columns of their sequences, validated, and options.

    shard: this rank's part of a head that is split over the vocabulary; None for a whole one.
    """

    targets: Tensor
    cu_targets: Tensor
    pairs: Tensor
    ref_logps: Tensor | None
    columns: PreferenceColumns
    loss: PreferenceLoss
    totals: StepTotals
    options: LogitOptions
    backend: str
    max_logits_bytes: int | None
    shard: VocabShard | None = None

    def engine(self, inputs: HeadInputs, needs: Needs, largest: int | None = None) -> HeadEngine:
        """The call's LM-head engine; needs and largest as in make_engine."""
        if self.shard is not None:
            return ShardedEngine(inputs, self.shard, self.backend, keep=needs.trains, largest=largest)
        return make_engine(inputs, self.backend, self.max_logits_bytes, needs=needs, largest=largest)

    def counted(self, rows: slice = slice(None)) -> Tensor | None:
        """Which of these targets are tokens, for a loss that asks how many there are; else None."""
        return self.targets[rows] != self.options.ignore_index if self.loss.needs_lengths else None


def components(cu_targets: list[int], rows: list[list[int]]) -> list[tuple[int, int]]:
    """The shortest runs of consecutive sequences [start, stop) that no row leaves: a pair, or a list filled with -1."""
    reach = list(range(len(cu_targets) - 1))
    for row in rows:
        low, high = min(sequence for sequence in row if sequence >= 0), max(row)
        reach[low] = max(reach[low], high)
    runs, start, stop = [], 0, 0
    for sequence, furthest in enumerate(reach):
        stop = max(stop, furthest + 1)
        if sequence + 1 == stop:
            runs.append((start, stop))
            start = stop
    return runs


def joined_runs(cu_targets: list[int], runs: list[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """Neighbouring runs joined while together they have at most `rows` targets."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and cu_targets[stop] - cu_targets[joined[-1][0]] <= rows:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def pair_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: PairCall, needs: Needs
) -> tuple[PairTerms, Gradients]:
    """The pairs' terms, and the gradients of sum(losses)/num_pairs that are needed."""
    inputs = HeadInputs(hidden, weight, bias, call.targets, call.options)
    if call.loss.counts_step_tokens and call.totals.num_chosen_tokens is None:
        # of the call, not of one block
        none = hidden.new_empty(0, dtype=inputs.wide)
        lengths = Tokens(none, call.cu_targets, call.counted(), weights=call.columns.token_weights).lengths()
        chosen_tokens = lengths[side_indices(call.pairs, lengths.device)[:, 0]].sum()
        call = replace(call, totals=replace(call.totals, num_chosen_tokens=chosen_tokens))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return (_with_trained_head if needs.trains else _with_frozen_head)(inputs, call, needs)


def _with_frozen_head(inputs: HeadInputs, call: PairCall, needs: Needs) -> tuple[PairTerms, Gradients]:
    """E·W is written where dh will be, and scaled by row once all coefficients are known."""
    engine, hidden = call.engine(inputs, needs), inputs.hidden
    block = _Block(slice(0, len(call.targets)), call.cu_targets, call.pairs, call.ref_logps, call.columns)
    if not needs.hidden:
        return _terms(concatenate(engine, engine.all_logps()), call, block)[0], (None, None, None)
    products = torch.empty_like(hidden, dtype=engine.narrow)
    terms, coefficients = _terms(concatenate(engine, engine.hidden_products(products)), call, block)
    if isinstance(engine, ShardedEngine):
        return terms, (engine.all_reduced(products * coefficients.unsqueeze(1)), None, None)
    dh = products if products.dtype == hidden.dtype else torch.empty_like(hidden)
    scale_rows(dh, products, coefficients, triton=uses_triton(call.backend))
    return terms, (dh, None, None)


def _with_trained_head(inputs: HeadInputs, call: PairCall, needs: Needs) -> tuple[PairTerms, Gradients]:
    cu_targets = call.cu_targets.tolist()
    together = call.pairs if call.columns.lists is None else call.columns.lists
    runs = [(0, len(cu_targets) - 1)] if call.loss.coupled else components(cu_targets, together.tolist())
    largest = max((cu_targets[stop] - cu_targets[start] for start, stop in runs), default=0)
    engine = call.engine(inputs, needs, largest)
    kept, gradients = engine.new_kept(), engine.gradients(needs)
    parts = []
    for start, stop in joined_runs(cu_targets, runs, engine.plan.kept_rows):
        rows = slice(cu_targets[start], cu_targets[stop])
        result = keep_and_recompute(engine, rows, kept)
        inside = (call.pairs[:, 0] >= start) & (call.pairs[:, 0] < stop)
        ref_logps = call.ref_logps
        if ref_logps is not None:
            ref_logps = ref_logps[start:stop] if ref_logps.dim() == 1 else ref_logps[_index(inside, ref_logps)]
        local = call.cu_targets[start : stop + 1] - rows.start
        columns = call.columns.of_rows(inside, rows, start)
        block = _Block(rows, local, call.pairs[inside] - start, ref_logps, columns)
        terms, coefficients = _terms(result, call, block)
        accumulate(engine, gradients, rows, coefficients, result.sums, kept)
        parts.append((inside, terms))
    return _concatenate_terms(parts, inputs, call), gradients.finish()


@dataclass(frozen=True)
class _Block:
    """Some whole components: their rows; cu_targets, pairs and columns counted from the first; their reference."""

    rows: slice
    cu_targets: Tensor
    pairs: Tensor
    ref_logps: Tensor | None
    columns: PreferenceColumns


def _terms(result: RowResult, call: PairCall, block: _Block) -> tuple[PairTerms, Tensor]:
    """The terms of a block's pairs, and the row coefficients c (rows,) of its targets."""
    log_sum_sq = result.stats.get("log_sum_sq_probs")
    tokens = Tokens(result.logps, block.cu_targets, call.counted(block.rows), log_sum_sq, block.columns.token_weights)
    terms = pair_terms(tokens, block.pairs, block.ref_logps, call.loss, call.totals, call.backend, block.columns)
    ignored = call.targets[block.rows] == call.options.ignore_index
    gradients = terms.coefficients / call.totals.num_pairs
    return terms, row_coefficients(gradients, result.sums.rescale, ignored)


def _index(inside: Tensor, like: Tensor) -> Tensor:
    """The pairs inside, as an index on the device of `like`."""
    return inside.nonzero().squeeze(1).to(like.device, non_blocking=True)


def _concatenate_terms(parts: list[tuple[Tensor, PairTerms]], inputs: HeadInputs, call: PairCall) -> PairTerms:
    """The blocks' terms in the order of the sequences and pairs."""
    if len(parts) == 1:
        return parts[0][1]

    def joined(field: str, each_pair: bool) -> Tensor:
        values = [getattr(terms, field) for _, terms in parts]
        if not each_pair:
            return torch.cat(values)
        every = inputs.hidden.new_empty((len(call.pairs), *values[0].shape[1:]), dtype=inputs.wide)
        for (inside, _), value in zip(parts, values, strict=True):
            every[_index(inside, every)] = value
        return every

    weighted = call.loss.ld_alpha is not None
    rewards = weighted or call.columns.beta is not None
    by_pair = {"losses": True, "logps": weighted, "rewards": rewards, "coefficients": False}
    return PairTerms(**{field: joined(field, by) for field, by in by_pair.items()})
