"""PackedBatch: one packed micro-batch that holds what sequences begin with alike once, and no padding.

A group is one prompt and its distinct responses (branches); a pair names two branches. Prompt [10 11 12], chosen
[20 21] and rejected [30 31 32] become one row of T = P + (C - 1) + (R - 1) = 6 positions:

    input_ids     10 11 12 20 | 30 31        a branch's last token is only a target: it needs no position
    position_ids   0  1  2  3 |  3  4
    segments      [0,3) [3,4) [4,6) with parents -1 0 0, which attention runs in two pieces (segments.py):
                  q rows [0,4) sees k rows 0..3 ; q rows [4,6) sees k rows 0..2 4..5    (causal, bottom-right)
    logit_rows     2  3 |  2  4  5           the last prompt row predicts both first tokens
    targets       20 21 | 30 31 32
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dpofast.losses.columns import NO_COLUMNS, PreferenceColumns
from dpofast.packing.media import BatchMedia
from dpofast.packing.parallel.row_split import RowSplit
from dpofast.packing.segments import Segments


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of T positions, N targets, S sequences (branches) and P pairs or lists, as a single row.

    Sequences are ordered by group, groups and sequences by first appearance; pairs and lists are ordered by example.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, a row's place in each sequence that it is part of.
        logit_rows: (N,) int64, the row of the backbone's output that predicts targets[i]; one row may predict several.
        targets: (N,) int64.
        segments: the rows that each row may attend to; stays on the CPU.
        cu_targets: (S + 1,) int32 on the CPU; the targets of sequence s are targets[cu_targets[s]:cu_targets[s + 1]].
        pairs: (P, 2) int32 on the CPU; chosen and rejected sequence.
        pair_examples: (P,) int64 on the CPU; index of each pair's example in the input of `pack`.
        ref_logps: (S,) float32 summed reference log-probs in nats, or None.
        columns: what the data say of the rows beside their responses. Of a list of more than two responses (its
            `lists`), `pairs` has the best and the worst.
        media: the images whose placeholders are among input_ids, or None.
        split: the rows and targets that this process computes where several share the batch, or None.
        padded_tokens: positions that a trainer with padding would compute: 2 * P (of lists the sum of their responses)
            * the longest prompt + response.
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
    columns: PreferenceColumns = NO_COLUMNS
    media: BatchMedia | None = None
    split: RowSplit | None = None

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
        """Preference pairs or lists, P."""
        return len(self.pairs)

    @property
    def members(self) -> Tensor:
        """The sequences of all pairs or lists, one after another: int64 on the CPU; a sequence may stand in several."""
        lists = self.pairs if self.columns.lists is None else self.columns.lists
        return lists[lists >= 0].long()

    @property
    def shared(self) -> bool:
        """Whether sequences share rows."""
        # Without a fork, one that begins another lies within its segment; but each that shares none begins a tree.
        return int((self.segments.parents < 0).sum()) < self.num_sequences

    def split_over(self, group: Any) -> PackedBatch:
        """Return a copy whose rows the ranks of a process group compute together (sequence parallelism, Ulysses).

        Every rank of the group splits the same batch and calls the model with it, which is a collective. Log-probs and
        the loss are those of the whole batch on each of them, and each rank's gradients are a part: their sum over the
        group is the gradient.

        Args:
            group: a torch.distributed process group whose backend is that of the batch's device.

        Raises:
            ValueError: a batch that is not on the CPU.
        """
        if not self.logit_rows.is_cpu:
            raise ValueError(
                f"split_over: expected a batch on the CPU, got one on {self.logit_rows.device}: split first"
            )
        return replace(self, split=RowSplit.of(self.num_tokens, self.logit_rows, group))

    def to(self, device: torch.device | str | int, non_blocking: bool = True) -> PackedBatch:
        """Return a copy with its tensors on `device`: ids, rows, targets, ref_logps, columns, media and split.

        The other tensors (segments, cu_targets, pairs, pair_examples, lists and ranks of columns) stay on the CPU.
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
            columns=self.columns.moved(move),
            media=None if self.media is None else self.media.moved(move),
            split=None if self.split is None else self.split.moved(move),
        )

    def padded(self, pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Unpack the batch into one padded row per sequence: prompt, response, padding on the right.

        Returns:
            input_ids, attention_mask and completion_mask, each (S, L) int64 on the batch's device, with L the longest
            prompt + response; the masks hold 0 and 1.
        """
        rows, last_target = self.paths(), self.cu_targets[1:].long().to(self.targets.device) - 1
        total = self.lengths()
        column = torch.arange(int(total.max()), device=self.targets.device)
        attended = column < total[:, None]
        ids = torch.nn.functional.pad(self.input_ids[rows.clamp(min=0)], (0, 1))
        ids = torch.where(column < total[:, None] - 1, ids, self.targets[last_target][:, None])
        input_ids = torch.where(attended, ids, pad_id)
        return input_ids, attended.long(), (attended & (column >= self._prompt_lengths()[:, None])).long()

    def paths(self) -> Tensor:
        """The packed row of each position of every sequence but its last token: (S, L − 1) int64, −1 past its end."""
        device, runs = self.targets.device, self.segments.runs
        last_rows = self.logit_rows[self.cu_targets[1:].long().to(device) - 1]
        total = self.lengths()
        column = torch.arange(int(total.max()) - 1, device=device)
        # the keys of a run are its path, in order of position; a sequence's is the one that its last row lies in
        keys, cu_seqlens_k = runs.key_rows().to(device), runs.cu_seqlens_k.long().to(device)
        place = cu_seqlens_k[runs.of_rows(last_rows)][:, None] + column
        return torch.where(column < total[:, None] - 1, keys[place.clamp(max=len(keys) - 1)], -1)

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
        unshared = int(lengths[self.members].sum())
        lists = self.columns.lists
        rows = "pairs" if lists is None else f"lists of up to {lists.shape[1]}"
        return (
            f"{self.num_tokens} tokens, {self.num_targets} targets, {self.num_sequences} sequences, "
            f"{self.num_pairs} {rows}; sharing saves {1 - self.num_tokens / unshared:.1%} of {unshared} tokens; "
            f"a padded trainer computes {self.padded_tokens} ({self.padded_tokens / self.num_tokens:.2f}x)"
        )

    def layout(self) -> str:
        """Return the whole batch as text, for small batches: rows split by run, targets by sequence."""
        runs, sequences = self.segments.runs, self.cu_targets.tolist()
        rows = runs.cu_seqlens_q.tolist()
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
        if self.columns.lists is not None:
            lines.append(("lists", str(self.columns.lists.tolist())))
        ranges = runs.ranges.split(runs.range_counts.tolist())
        for (start, stop), seen in zip(pairwise(rows), ranges, strict=True):
            keys = " ".join(f"{low}..{high - 1}" for low, high in seen.tolist())
            lines.append(("run", f"q rows [{start},{stop}) sees k rows {keys}"))
        return "\n".join(f"{name:<13} {text}" for name, text in lines)
