"""PaddedRows: trl's padded rows, packed, with the indices that lead back to trl's (rows, width - 1) next-token grid.

A row is a prompt, a response whose tokens are labelled, and padding on the right. What rows begin with alike is
computed once (rows truncated from the left, by different lengths, share nothing). A row without labels (a prompt that
fills max_length) is not computed. Everything here runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpofast.model.vision.inputs import VisionInputs
from dpofast.packing.batch import PackedBatch
from dpofast.packing.media import PromptMedia
from dpofast.packing.pack import pack
from dpofast.packing.split import split_by_kind

# The model's argument for the rows, beside trl's own; a RowsBatch gives them under this name too.
ROWS_KEY = "dpofast_rows"


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A packed batch and the index tensors that lead from it to trl's grid; made by PaddedRows.packed.

    Attributes:
        batch: the distinct (prompt, response) sequences of the rows.
        logit_rows: (N,) int64, the packed rows that predict a label, each distinct one once.
        targets: (N,) int64, the labels that they predict.
        source: (M,) int64, for each label of the grid its index into the N targets.
        cells: (M,) int64, for each label its index into the flattened grid.
        attended: (A,) int64, the packed row of every token of every padded row; None unless it was asked for.
    """

    batch: PackedBatch
    logit_rows: Tensor
    targets: Tensor
    source: Tensor
    cells: Tensor
    attended: Tensor | None

    def to(self, device: torch.device) -> PackedRows:
        """A copy on the device, through page-locked memory, so that the copy is asynchronous."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        batch = self.batch.pin_memory() if device.type == "cuda" else self.batch
        names = ("logit_rows", "targets", "source", "cells")
        moved = {name: move(getattr(self, name)) for name in names}
        return replace(
            self, batch=batch.to(device), attended=None if self.attended is None else move(self.attended), **moved
        )


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """The tokens and labels of a padded batch, on the CPU; read by the collator where possible.

    It holds memory of its own: a data-loading worker moves the batch's tensors into shared memory and frees theirs.

    Attributes:
        shape: rows and width of the padded batch.
        ids: the tokens of each row, without padding.
        labels: the positions of each row's labelled tokens, ascending, 1 or more: nothing predicts position 0.
        media: the images of each row, None for a row without; None where no images were read.
    """

    shape: tuple[int, int]
    ids: list[np.ndarray]
    labels: list[np.ndarray]
    media: list[PromptMedia | None] | None = None
    _made: dict[tuple[bool, torch.device], PackedRows | None] = field(default_factory=dict)

    @staticmethod
    def from_tensors(input_ids: Tensor, attention_mask: Tensor | None, labelled: Tensor) -> PaddedRows:
        """Read the rows of (rows, width) tensors; tensors on a device are copied to the CPU, which waits for it.

        Raises:
            ValueError: shapes that differ, a row without tokens, or padding that is not on the right.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.dim() != 2 or mask.shape != input_ids.shape or labelled.shape != input_ids.shape:
            raise ValueError(
                f"input_ids, attention_mask and labels: expected equal shapes (rows, width), got "
                f"{tuple(input_ids.shape)}, {tuple(mask.shape)} and {tuple(labelled.shape)}"
            )
        attended = mask.cpu().numpy() != 0
        lengths = attended.sum(1)
        # The last attended column tells how long a row is only where the padding is on the right.
        if (lengths == 0).any() or not attended[np.arange(len(lengths)), lengths - 1].all():
            raise ValueError("attention_mask: expected rows of at least one token, padded on the right")
        if (attended != (np.arange(attended.shape[1]) < lengths[:, None])).any():
            raise ValueError("attention_mask: expected rows of at least one token, padded on the right")
        ids, labels = input_ids.cpu().numpy().copy(), labelled.cpu().numpy() & attended
        labels[:, 0] = False
        return PaddedRows(
            shape=(len(ids), ids.shape[1]),
            ids=[row[:length] for row, length in zip(ids, lengths, strict=True)],
            labels=[np.flatnonzero(row) for row in labels],
        )

    def with_media(self, inputs: VisionInputs, processed: Mapping[str, Any]) -> PaddedRows:
        """A copy with the images that the processor's tensors for these rows have.

        Raises:
            ValueError: a row whose placeholders are not those of whole images.
        """
        return replace(self, media=inputs.of_batch(self.ids, processed), _made={})

    @property
    def num_labels(self) -> int:
        """Labelled tokens of all rows, M."""
        return sum(map(len, self.labels))

    def cells(self) -> np.ndarray:
        """(M,) int64: where each label lies in the flattened (rows, width - 1) grid of next-token values."""
        width = self.shape[1] - 1
        return _joined([row * width + positions - 1 for row, positions in enumerate(self.labels)])

    def unshared_pairs(self) -> int:
        """Pairs (row i and row i + rows/2) whose prompts differ, so that their rows do not share a whole one."""
        half = len(self.ids) // 2
        pairs = zip(range(half), range(half, 2 * half), strict=True)
        return sum(
            bool(len(self.labels[i]) and len(self.labels[j])) and self._prompt_key(i) != self._prompt_key(j)
            for i, j in pairs
        )

    def packed(
        self, device: torch.device, *, every_token: bool = False, kinds: Callable[[Tensor], Tensor] | None = None
    ) -> PackedRows | None:
        """The packed rows on the device, or None where no row has a label. Computed once for each device.

        kinds makes of the sequences' lengths (S,) the kinds (S,) that share rows only among themselves (its results
        are not kept). every_token also gives the last token of a row a position, and computes rows without labels: what
        a loss over every token of the padded rows needs (the balancing loss of a mixture of experts).
        """
        if kinds is not None:
            packed = self._pack(every_token, kinds)
            return None if packed is None else packed.to(device)
        key = (every_token, device)
        if key not in self._made:
            packed = self._pack(every_token, None)
            self._made[key] = None if packed is None else packed.to(device)
        return self._made[key]

    def _prompt(self, row: int) -> np.ndarray:
        labels = self.labels[row]
        return self.ids[row][: labels[0] if len(labels) else None]

    def _media(self, row: int) -> PromptMedia | None:
        return None if self.media is None else self.media[row]

    def _prompt_key(self, row: int) -> tuple[bytes, ...]:
        """Equal for rows whose prompts have equal tokens and equal images."""
        media = self._media(row)
        return self._prompt(row).tobytes(), *(() if media is None else (image.key for image in media.images))

    def _pack(self, every_token: bool, kinds: Callable[[Tensor], Tensor] | None) -> PackedRows | None:
        if self.num_labels == 0:
            return None
        # prompt -> response -> rows, by content
        groups: dict[tuple[bytes, ...], dict[bytes, list[int]]] = {}
        rows = [row for row, labels in enumerate(self.labels) if every_token or len(labels)]
        for row in rows:
            response = self.ids[row][len(self._prompt(row)) :].tobytes()
            groups.setdefault(self._prompt_key(row), {}).setdefault(response, []).append(row)
        examples = [self._example(list(responses.values()), every_token) for responses in groups.values()]
        (batch,) = pack(examples)
        if kinds is not None:
            batch = split_by_kind(batch, kinds(batch.lengths() - int(every_token)))
        sequence_of = np.zeros(len(self.ids), np.int64)
        # Pair k of a group names its first branch and branch k + 1.
        pairs = iter(batch.pairs.numpy())
        for responses in groups.values():
            members = list(responses.values())
            for index in range(1, max(2, len(members))):
                first, other = next(pairs)
                sequence_of[members[0]] = first
                if index < len(members):
                    sequence_of[members[index]] = other
        begins = batch.cu_targets.numpy()[sequence_of].astype(np.int64)
        wanted, source = np.unique(
            _joined([begins[row] + self.labels[row] - self.labels[row][0] for row in rows if len(self.labels[row])]),
            return_inverse=True,
        )
        unique = torch.from_numpy(wanted)
        return PackedRows(
            batch=batch,
            logit_rows=batch.logit_rows[unique],
            targets=batch.targets[unique],
            source=torch.from_numpy(source),
            cells=torch.from_numpy(self.cells()),
            attended=torch.from_numpy(self._attended(batch, begins)) if every_token else None,
        )

    def _example(self, members: list[list[int]], every_token: bool) -> dict[str, object]:
        """One prompt with its distinct responses, as `pack` reads it; the pairs are there to name every branch."""
        prompt = self._prompt(members[0][0])
        branches = [self.ids[rows[0]][len(prompt) :] for rows in members]
        if every_token:  # pack gives a branch's last token no position: append one more token
            branches = [np.append(branch, 0) for branch in branches]
        if len(branches) == 1:  # pack needs pairs of different branches; one of a single token takes no position
            branches.append(np.array([int(np.array_equal(branches[0], [0]))]))
        return {
            "prompt_ids": prompt,
            "branches": branches,
            "pairs": [(0, k) for k in range(1, len(branches))],
            "media": self._media(members[0][0]),
        }

    def _attended(self, batch: PackedBatch, begins: np.ndarray) -> np.ndarray:
        """PackedRows.attended; begins (rows,) is each row's first target in the batch."""
        runs, lengths = batch.segments.runs, np.array([len(ids) for ids in self.ids])
        responses = lengths - [len(self._prompt(row)) for row in range(len(lengths))]
        # The keys of the run that a row's last token is in are its path, in order of position.
        at = runs.of_rows(batch.logit_rows[torch.from_numpy(begins + responses)])
        keys, starts = runs.key_rows().numpy(), runs.cu_seqlens_k[at].numpy()
        return _joined([keys[start : start + length] for start, length in zip(starts, lengths, strict=True)])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
