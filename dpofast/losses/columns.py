"""PreferenceColumns: what data say of pairs and lists beside their responses, as tensors that follow a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Of the fields, those that stay on the CPU: they say which numbers go together, and are read without a sync.
_ON_CPU = ("lists", "ranks")


class PreferenceColumns(NamedTuple):
    """Optional columns of P rows, each a pair or a list of responses; None where the data have no such column.

    Attributes:
        weight: (P,) float32, factor of the row's loss. The divisor of a loss stays the number of rows.
        margin: (P,) float32, nats, subtracted from βΔ (offsets of ODPO, arXiv 2402.10571).
        beta: (P,) float32 above 0, in place of the loss's beta.
        label_smoothing: (P,) float32, in place of the loss's.
        token_weights: (N,) float32 of 0 or more, factor of every target's log-prob in its sequence's sum.
        lists: (P, K) int32 on the CPU, the sequences of every list, best first, filled with -1. None for pairs.
        ranks: (P, K) int32 on the CPU, the ranks of these responses from 0, which is the best; equal ones are tied;
            filled with -1.
        scores: (P, K) float32, their scores, filled with 0; None without.
    """

    weight: Tensor | None = None
    margin: Tensor | None = None
    beta: Tensor | None = None
    label_smoothing: Tensor | None = None
    token_weights: Tensor | None = None
    lists: Tensor | None = None
    ranks: Tensor | None = None
    scores: Tensor | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the columns that there are."""
        return tuple(name for name, value in self._asdict().items() if value is not None)

    def moved(self, move: Callable[[Tensor], Tensor]) -> PreferenceColumns:
        """A copy with `move` applied to all tensors but lists and ranks, which stay on the CPU."""
        return self._replace(
            **{name: move(value) for name, value in self._asdict().items() if value is not None and name not in _ON_CPU}
        )

    def of_rows(self, inside: Tensor, targets: slice, first: int) -> PreferenceColumns:
        """The columns of some rows whose sequences lie together.

        Args:
            inside: (P,) bool on the CPU, which rows.
            targets: the targets of these sequences.
            first: the number of the first of these sequences, which becomes 0.
        """
        if not self.given:
            return self
        index = inside.nonzero().squeeze(1)
        of_some = {
            name: value[index.to(value.device, non_blocking=True)]
            for name, value in self._asdict().items()
            if value is not None and name != "token_weights"
        }
        if self.lists is not None:
            of_some["lists"] = torch.where(of_some["lists"] < 0, -1, of_some["lists"] - first).to(torch.int32)
        if self.token_weights is not None:
            of_some["token_weights"] = self.token_weights[targets]
        return self._replace(**of_some)

    @staticmethod
    def joined(parts: list[PreferenceColumns], sequences_before: list[int]) -> PreferenceColumns:
        """The columns of several micro-batches as those of one.

        Args:
            parts: of each.
            sequences_before: how many sequences stand before those of each.

        Raises:
            ValueError: a column that only some of them have.
        """
        columns: dict[str, Tensor] = {}
        for name in PreferenceColumns._fields:
            values = [getattr(part, name) for part in parts]
            if all(value is None for value in values):
                continue
            if any(value is None for value in values):
                raise ValueError(f"{name}: expected in every micro-batch of the step or in none, got it in some")
            if name == "lists":
                values = [
                    torch.where(value < 0, -1, value + before).to(torch.int32)
                    for value, before in zip(values, sequences_before, strict=True)
                ]
            if values[0].dim() == 2:
                width, fill = max(value.shape[1] for value in values), 0 if name == "scores" else -1
                values = [torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values]
            columns[name] = torch.cat(values)
        return PreferenceColumns(**columns)


NO_COLUMNS = PreferenceColumns()
