"""Preference pairs -> packed micro-batches: every prompt once, every distinct response once, no pad token.

A group is one prompt and its distinct responses (branches); a pair names two branches. Prompt [10 11 12], chosen
[20 21] and rejected [30 31 32] become one row of T = P + (C - 1) + (R - 1) = 6 positions:

    input_ids     10 11 12 20 | 30 31        a branch's last token is only a target: it needs no position
    position_ids   0  1  2  3 |  3  4
    segments      q rows [0,4) sees k rows 0..3 ; q rows [4,6) sees k rows 0..2 4..5    (causal, bottom-right)
    logit_rows     2  3 |  2  4  5           the last prompt row predicts both first tokens
    targets       20 21 | 30 31 32

The work is done in C++ (csrc/packing.cpp); this module reads examples and wraps the arrays without copying them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpofast import _C

# Equal branches of one group may come with reference log-probs from different batches; more than noise is an error.
REF_LOGPS_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Segments:
    """Variable-length causal (bottom-right) attention over the rows of a packed batch; G segments.

    Segment g's queries are rows [cu_seqlens_q[g], cu_seqlens_q[g + 1]); its keys are the prompt rows
    [prefixes[g, 0], prefixes[g, 1]) followed by its own rows. A prompt and its first branch are one segment, whose
    prefix is (0, 0).

    Attributes:
        cu_seqlens_q: (G + 1,) int32 on the CPU.
        prefixes: (G, 2) int32 on the CPU.
    """

    cu_seqlens_q: Tensor
    prefixes: Tensor

    @property
    def num_segments(self) -> int:
        """The number of segments, G."""
        return len(self.prefixes)

    def cu_seqlens_k(self) -> Tensor:
        """Cumulative key counts, (G + 1,) int32 on the CPU.

        Raises:
            ValueError: if the keys of all segments together pass int32.
        """
        counts = self.cu_seqlens_q.diff().long() + self.prefixes[:, 1] - self.prefixes[:, 0]
        total = int(counts.sum())
        if total > torch.iinfo(torch.int32).max:
            raise ValueError(f"the segments see {total} keys; int32 allows 2**31 - 1: pack with a smaller max_tokens")
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()

    def key_rows(self) -> Tensor:
        """The packed row of every key, segment after segment: (K,) int64 on the CPU, K = cu_seqlens_k()[-1]."""
        # Each segment is two runs of consecutive rows: its prefix and its own.
        starts = torch.stack((self.prefixes[:, 0], self.cu_seqlens_q[:-1]), dim=1).flatten().long()
        stops = torch.stack((self.prefixes[:, 1], self.cu_seqlens_q[1:]), dim=1).flatten().long()
        counts = stops - starts
        shift = starts - (counts.cumsum(0) - counts)
        return shift.repeat_interleave(counts) + torch.arange(int(counts.sum()))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of T positions, N targets, S sequences (branches) and P pairs, as a single row.

    Sequences run group by group, in order of first appearance; pairs ascend by example.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, restarting after the prompt for every branch.
        logit_rows: (N,) int64, the row of the trunk's output that predicts targets[i].
        targets: (N,) int64.
        segments: what each row may attend to; stays on the CPU.
        cu_targets: (S + 1,) int32 on the CPU; sequence s owns targets[cu_targets[s]:cu_targets[s + 1]].
        pairs: (P, 2) int32 on the CPU; chosen and rejected sequence.
        pair_examples: (P,) int64 on the CPU; index of the example, as handed to `pack`, that each pair came from.
        ref_logps: (S,) float32 summed reference log-probs in nats, or None.
        padded_tokens: what a padded trainer would compute: 2 * P * the longest prompt + response.
    """

    input_ids: Tensor
    position_ids: Tensor
    logit_rows: Tensor
    targets: Tensor
    segments: Segments
    cu_targets: Tensor
    pairs: Tensor
    pair_examples: Tensor
    ref_logps: Tensor | None
    padded_tokens: int

    @property
    def num_tokens(self) -> int:
        """Packed positions, T."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Response tokens to score, N."""
        return len(self.targets)

    @property
    def num_sequences(self) -> int:
        """Distinct responses, S."""
        return len(self.cu_targets) - 1

    @property
    def num_pairs(self) -> int:
        """Preference pairs, P."""
        return len(self.pairs)

    def to(self, device: torch.device | str | int, non_blocking: bool = True) -> PackedBatch:
        """A copy with the (T,), (N,) and (S,) tensors on `device`; the bounds and pairs stay on the CPU."""
        # A copy to the CPU that does not block could be read before it has arrived.
        non_blocking = non_blocking and torch.device(device).type != "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """A copy with the tensors that `to` moves in page-locked memory.

        Raises:
            ValueError: if CUDA is not available.
        """
        if not torch.cuda.is_available():
            raise ValueError("pin_memory needs CUDA, which is not available here; leave it out")
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            logit_rows=move(self.logit_rows),
            targets=move(self.targets),
            ref_logps=None if self.ref_logps is None else move(self.ref_logps),
        )

    def padded(self, pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The same sequences, one padded row each: prompt, response, padding on the right.

        Returns:
            input_ids, attention_mask and completion_mask, each (S, L) int64 on the batch's device, with L the longest
            prompt + response; the masks hold 0 and 1.
        """
        bounds = self.cu_targets.long().to(self.targets.device)
        first = bounds[:-1]
        last_prompt_row = self.logit_rows[first]
        prompt_length = self._prompt_lengths()
        total = prompt_length + bounds.diff()
        column = torch.arange(int(total.max()), device=total.device)
        in_prompt = column < prompt_length[:, None]
        attended = column < total[:, None]
        prompt_rows = (last_prompt_row - prompt_length + 1)[:, None] + column
        target_rows = (first - prompt_length)[:, None] + column
        prompt_ids = self.input_ids[prompt_rows.clamp(max=self.num_tokens - 1)]
        response_ids = self.targets[target_rows.clamp(0, self.num_targets - 1)]
        input_ids = torch.where(in_prompt, prompt_ids, torch.where(attended, response_ids, pad_id))
        return input_ids, attended.long(), (attended & ~in_prompt).long()

    def _prompt_lengths(self) -> Tensor:
        """(S,) int64 on the batch's device: a sequence's first target is predicted by its last prompt row."""
        first = self.cu_targets[:-1].long().to(self.targets.device)
        return self.position_ids[self.logit_rows[first]] + 1

    def describe(self) -> str:
        """One line: sizes, what sharing saves, and what a padded trainer would compute."""
        lengths = self._prompt_lengths().cpu() + self.cu_targets.diff() - 1
        unshared = int(lengths[self.pairs.long()].sum())
        return (
            f"{self.num_tokens} tokens, {self.num_targets} targets, {self.num_sequences} sequences, "
            f"{self.num_pairs} pairs; sharing saves {1 - self.num_tokens / unshared:.1%} of {unshared} tokens; "
            f"a padded trainer computes {self.padded_tokens} ({self.padded_tokens / self.num_tokens:.2f}x)"
        )

    def layout(self) -> str:
        """A text picture of the whole batch, for small ones: rows split by segment, targets by sequence."""
        rows, sequences = self.segments.cu_seqlens_q.tolist(), self.cu_targets.tolist()
        numbers = {
            "input_ids": (self.input_ids.tolist(), rows),
            "position_ids": (self.position_ids.tolist(), rows),
            "logit_rows": (self.logit_rows.tolist(), sequences),
            "targets": (self.targets.tolist(), sequences),
        }
        width = max(len(str(value)) for values, _ in numbers.values() for value in values)
        lines = []
        for name, (values, bounds) in numbers.items():
            parts = (" ".join(f"{value:>{width}}" for value in values[start:stop]) for start, stop in pairwise(bounds))
            lines.append((name, " | ".join(parts)))
        lines += [("cu_targets", str(sequences)), ("pairs", str(self.pairs.tolist()))]
        for (start, stop), (low, high) in zip(pairwise(rows), self.segments.prefixes.tolist(), strict=True):
            prefix = f"{low}..{high - 1} " if high > low else ""
            lines.append(("segment", f"q rows [{start},{stop}) sees k rows {prefix}{start}..{stop - 1}"))
        return "\n".join(f"{name:<13} {text}" for name, text in lines)


@dataclass(frozen=True, eq=False)
class Plan:
    """Items assigned to micro-batches, which are numbered by descending load.

    Attributes:
        micro_batches: the item indices of each micro-batch, ascending, int64.
        loads: (M,) int64, the summed lengths of each micro-batch.
        oversized: how many items are longer than max_tokens; each is alone in its micro-batch.
    """

    micro_batches: list[np.ndarray]
    loads: np.ndarray
    oversized: int


def plan(lengths: Sequence[int] | np.ndarray, max_tokens: int | None = None) -> Plan:
    """Assigns items of given lengths to as few micro-batches of max_tokens as best-fit decreasing finds.

    Up to 8,192 items (an optimizer step) are then spread evenly over that many micro-batches: the largest load falls,
    the count stays. Deterministic; the loads depend on the lengths alone, not on their order. O(n log n).

    Args:
        lengths: (n,) integers, packed tokens of each item; 1 or more.
        max_tokens: the budget of a micro-batch; None puts everything into one.

    Raises:
        ValueError: if lengths is not a 1-D integer array of values in [1, 2**31), if max_tokens is below 1, or if a
            micro-batch would pass int32 positions.
    """
    limit = _limit("max_tokens", max_tokens)
    sizes = _integers(lengths, "lengths").astype(np.int64)
    bin_of, loads = _C.plan(sizes, limit)
    order = np.argsort(bin_of, kind="stable")
    splits = np.cumsum(np.bincount(bin_of, minlength=len(loads)))[:-1]
    micro_batches = np.split(order, splits) if len(loads) else []
    return Plan(micro_batches=micro_batches, loads=loads, oversized=int((sizes > limit).sum()))


def pack(
    examples: Iterable[Mapping[str, Any]],
    max_tokens: int | None = None,
    *,
    share_prompts: bool = True,
    vocab_size: int | None = None,
) -> list[PackedBatch]:
    """Packs examples into micro-batches of at most max_tokens positions.

    Examples with equal prompts share one group, and equal responses inside it are one branch. A group is split only
    if it is larger than max_tokens, a pair never: one longer than max_tokens goes alone, but for pairs that add no
    token to it, and its batch has num_tokens > max_tokens. Every pair lands in exactly one batch. Batches are
    evenly filled (see `plan`) and come largest first; their sizes do not depend on the order of the examples.

    Args:
        examples: mappings with prompt_ids, chosen_ids and rejected_ids (1-D integers, at least one each) and, for all
            examples or none, ref_chosen_logps and ref_rejected_logps (floats: summed nats); or groups with
            prompt_ids, branches (K responses), pairs (a list of (chosen, rejected) indices) and ref_logps (K floats).
            Other keys are ignored.
        max_tokens: the budget of a micro-batch; None makes one batch.
        share_prompts: False gives every branch its own copy of the prompt, to measure what sharing is worth.
        vocab_size: where given, token ids must be below it.

    Returns:
        The batches, on the CPU; [] for no examples.

    Raises:
        ValueError: naming the example and what is wrong with it, or the argument.
    """
    token_limit, id_limit = _limit("max_tokens", max_tokens), _limit("vocab_size", vocab_size)
    flat = _Flat()
    for index, example in enumerate(examples):
        flat.add(index, example)
    if not flat.grouped:
        return []
    lengths = np.fromiter(map(len, flat.sequences), np.int64, len(flat.sequences))
    batches, canonical = _C.pack(
        np.concatenate(flat.sequences, dtype=np.int64, casting="same_kind"),
        lengths,
        np.array(flat.branch_counts, np.int64),
        np.array(flat.pair_counts, np.int64),
        np.array(flat.pairs, np.int64).reshape(-1, 2),
        np.array(flat.grouped, np.uint8),
        token_limit,
        share_prompts,
        id_limit,
    )
    refs = flat.reference_logps(canonical)
    return [_wrap(arrays, refs) for arrays in batches]


def _wrap(arrays: dict[str, Any], refs: np.ndarray | None) -> PackedBatch:
    sequences, padded_tokens = arrays.pop("sequences"), arrays.pop("padded_tokens")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    segments = Segments(tensors.pop("cu_seqlens_q"), tensors.pop("prefixes"))
    ref_logps = None if refs is None else torch.from_numpy(refs[sequences].astype(np.float32))
    return PackedBatch(**tensors, segments=segments, ref_logps=ref_logps, padded_tokens=padded_tokens)


@dataclass
class _Flat:
    """Examples as the flat lists that the C++ packer reads; a sequence is a prompt or a branch."""

    sequences: list[np.ndarray] = field(default_factory=list)
    branch_counts: list[int] = field(default_factory=list)
    pair_counts: list[int] = field(default_factory=list)
    pairs: list[Any] = field(default_factory=list)
    grouped: list[bool] = field(default_factory=list)
    refs: list[float] = field(default_factory=list)  # one for each sequence (NaN for prompts), or none at all

    def add(self, index: int, example: Mapping[str, Any]) -> None:
        if not isinstance(example, Mapping):
            raise ValueError(f"examples[{index}]: expected a mapping, got {type(example).__name__}")
        # A table that mixes both forms has the other one's columns, with None in them.
        grouped = example.get("branches") is not None
        if grouped and any(example.get(key) is not None for key in ("chosen_ids", "rejected_ids")):
            raise ValueError(f"examples[{index}]: has both branches and chosen_ids or rejected_ids; give one form")
        keys = ("prompt_ids", "branches", "pairs") if grouped else ("prompt_ids", "chosen_ids", "rejected_ids")
        missing = [key for key in keys if example.get(key) is None]
        if missing:
            raise ValueError(
                f"examples[{index}]: {', '.join(missing)} missing; expected prompt_ids, chosen_ids, rejected_ids "
                f"or prompt_ids, branches, pairs; got {', '.join(map(str, example))}"
            )
        row = f"examples[{index}]: "
        self.sequences.append(_integers(example["prompt_ids"], row + "prompt_ids"))
        pairs: list[Any] = [(0, 1)]
        refs: Sequence[float] | None
        if grouped:
            responses = _items(example["branches"], row + "branches")
            branches = [_integers(ids, f"{row}branches[{k}]") for k, ids in enumerate(responses)]
            pairs = _pairs(example["pairs"], row + "pairs")
            refs = _group_refs(example.get("ref_logps"), row + "ref_logps", len(branches))
        else:
            branches = [_integers(example[key], row + key) for key in keys[1:]]
            refs = _pair_refs(example, row)
        self.sequences.extend(branches)
        self.branch_counts.append(len(branches))
        self.pair_counts.append(len(pairs))
        self.pairs.extend(pairs)
        if index and bool(self.refs) != (refs is not None):
            raise ValueError(
                f"examples[{index}]: {'no' if refs is None else 'has'} reference log-probs, unlike the examples before "
                "it; give them for all examples or none"
            )
        if refs is not None:
            self.refs.extend((math.nan, *refs))
        self.grouped.append(grouped)

    def reference_logps(self, canonical: np.ndarray) -> np.ndarray | None:
        """One float64 for each sequence, or None; equal branches must agree with the first of them, canonical."""
        if not self.refs:
            return None
        refs = np.array(self.refs, np.float64)
        apart = np.abs(refs - refs[canonical]) > REF_LOGPS_TOLERANCE
        if apart.any():
            owners = np.repeat(np.arange(len(self.grouped)), np.array(self.branch_counts) + 1)
            other = int(apart.argmax())
            first = int(canonical[other])
            raise ValueError(
                f"examples[{owners[other]}]: reference log-prob {refs[other]:.6g} of a response that examples"
                f"[{owners[first]}] holds with {refs[first]:.6g}; equal responses to equal prompts must agree within "
                f"{REF_LOGPS_TOLERANCE:g} nats"
            )
        return refs


def _limit(name: str, value: int | None) -> int:
    if value is None:
        return _C.UNLIMITED
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= _C.UNLIMITED:
        raise ValueError(f"{name}: expected None or an integer in [1, 2**63), got {value!r}")
    return int(value)


def _integers(value: Any, name: str, columns: int | None = None) -> np.ndarray:
    """A 1-D integer array, or a 2-D one where columns is given."""
    expected = f"{name}: expected integers, a 1-D array or list" + (f" of {columns} each" if columns else "")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on another device
        raise ValueError(f"{expected}; {error}") from error
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)  # np.asarray([]) is float64
    if array.ndim != (2 if columns else 1) or array.dtype.kind not in "iu" or (columns and array.shape[1] != columns):
        raise ValueError(f"{expected}, got shape {array.shape} of {array.dtype}")
    return array


def _items(value: Any, name: str) -> list[Any]:
    try:
        return list(value)
    except TypeError as error:
        raise ValueError(f"{name}: expected a list, got {type(value).__name__}") from error


def _pairs(value: Any, name: str) -> list[list[int]]:
    return _integers(value, f"{name} of (chosen, rejected) branch indices", columns=2).astype(np.int64).tolist()


def _pair_refs(example: Mapping[str, Any], row: str) -> tuple[float, float] | None:
    chosen, rejected = example.get("ref_chosen_logps"), example.get("ref_rejected_logps")
    if chosen is None and rejected is None:
        return None
    return _ref(chosen, row + "ref_chosen_logps"), _ref(rejected, row + "ref_rejected_logps")


def _group_refs(value: Any, name: str, branches: int) -> list[float] | None:
    if value is None:
        return None
    refs = _items(value, name)
    if len(refs) != branches:
        raise ValueError(f"{name}: expected {branches} floats, one a branch, got {len(refs)}")
    return [_ref(ref, f"{name}[{k}]") for k, ref in enumerate(refs)]


def _ref(value: Any, name: str) -> float:
    try:
        ref = float(value)
    except (TypeError, ValueError):
        ref = math.nan
    if not math.isfinite(ref):
        raise ValueError(f"{name}: expected a finite float, got {value!r}")
    return ref
