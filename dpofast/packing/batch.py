"""PackedBatch: one packed micro-batch that holds every prompt once, every distinct response once and no padding.

A group is one prompt and its distinct responses (branches); a pair names two branches. Prompt [10 11 12], chosen
[20 21] and rejected [30 31 32] become one row of T = P + (C - 1) + (R - 1) = 6 positions:

    input_ids     10 11 12 20 | 30 31        a branch's last token is only a target: it needs no position
    position_ids   0  1  2  3 |  3  4
    segments      q rows [0,4) sees k rows 0..3 ; q rows [4,6) sees k rows 0..2 4..5    (causal, bottom-right)
    logit_rows     2  3 |  2  4  5           the last prompt row predicts both first tokens
    targets       20 21 | 30 31 32
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Bounds of variable-length causal (bottom-right aligned) attention over a packed batch, in G segments.

    Segment g's queries are rows [cu_seqlens_q[g], cu_seqlens_q[g + 1]); its keys are the prompt rows
    [prefixes[g, 0], prefixes[g, 1]) followed by its own rows. A prompt and its first branch are one segment, whose
    prefix is (0, 0).

    Attributes:
        cu_seqlens_q: (G + 1,) int32 on the CPU.
        prefixes: (G, 2) int32 on the CPU, first and last + 1 prompt row that the segment also attends to.
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
            ValueError: the total number of keys exceeds int32.
        """
        counts = self.cu_seqlens_q.diff().long() + self.prefixes[:, 1] - self.prefixes[:, 0]
        total = int(counts.sum())
        if total > torch.iinfo(torch.int32).max:
            raise ValueError(f"the segments see {total} keys; int32 allows 2**31 - 1: pack with a smaller max_tokens")
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()

    def key_rows(self) -> Tensor:
        """Packed row index of every key, ordered by segment: (K,) int64 on the CPU, K = cu_seqlens_k()[-1]."""
        # A segment's keys are two ranges of consecutive rows: its prefix and its own rows.
        starts = torch.stack((self.prefixes[:, 0], self.cu_seqlens_q[:-1]), dim=1).flatten().long()
        stops = torch.stack((self.prefixes[:, 1], self.cu_seqlens_q[1:]), dim=1).flatten().long()
        counts = stops - starts
        shift = starts - (counts.cumsum(0) - counts)
        return shift.repeat_interleave(counts) + torch.arange(int(counts.sum()))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of T positions, N targets, S sequences (branches) and P pairs, as a single row.

    Sequences are ordered by group, groups and sequences by first appearance; pairs are ordered by example.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, restarting after the prompt for every branch.
        logit_rows: (N,) int64, the row of the backbone's output that predicts targets[i].
        targets: (N,) int64.
        segments: the rows that each row may attend to; stays on the CPU.
        cu_targets: (S + 1,) int32 on the CPU; the targets of sequence s are targets[cu_targets[s]:cu_targets[s + 1]].
        pairs: (P, 2) int32 on the CPU; chosen and rejected sequence.
        pair_examples: (P,) int64 on the CPU; index of each pair's example in the input of `pack`.
        ref_logps: (S,) float32 summed reference log-probs in nats, or None.
        padded_tokens: positions that a trainer with padding would compute: 2 * P * the longest prompt + response.
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
        """Return a copy with input_ids, position_ids, logit_rows, targets and ref_logps on `device`.

        The other tensors (segments, cu_targets, pairs, pair_examples) stay on the CPU.
        """
        # A non-blocking copy to the CPU could be read before it is complete.
        non_blocking = non_blocking and torch.device(device).type != "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return a copy with the tensors that `to` moves in page-locked memory.

        Raises:
            ValueError: CUDA is not available.
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
        """Unpack the batch into one padded row per sequence: prompt, response, padding on the right.

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

    def lengths(self) -> Tensor:
        """Tokens of every sequence, prompt and response: (S,) int64 on the batch's device."""
        return self._prompt_lengths() + self.cu_targets.diff().long().to(self.targets.device)

    def _prompt_lengths(self) -> Tensor:
        """Prompt length of every sequence, (S,) int64 on the batch's device."""
        # A sequence's first target is predicted by its last prompt row.
        first = self.cu_targets[:-1].long().to(self.targets.device)
        return self.position_ids[self.logit_rows[first]] + 1

    def describe(self) -> str:
        """Return one line with the sizes, the share of tokens saved by sharing, and the tokens of a padded batch."""
        lengths = self._prompt_lengths().cpu() + self.cu_targets.diff() - 1
        unshared = int(lengths[self.pairs.long()].sum())
        return (
            f"{self.num_tokens} tokens, {self.num_targets} targets, {self.num_sequences} sequences, "
            f"{self.num_pairs} pairs; sharing saves {1 - self.num_tokens / unshared:.1%} of {unshared} tokens; "
            f"a padded trainer computes {self.padded_tokens} ({self.padded_tokens / self.num_tokens:.2f}x)"
        )

    def layout(self) -> str:
        """Return the whole batch as text, for small batches: rows split by segment, targets by sequence."""
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
