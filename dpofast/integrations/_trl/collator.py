"""trl's collators for preference pairs, which also read the padded rows (PaddedRows) while they are on the CPU.

Reading them later, and the pixels of images, from tensors on a device would be a sync at every step. The classes have a
module of their own, so that data-loading workers can unpickle them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from dpofast.integrations._trl.rows import ROWS_KEY, PaddedRows
from dpofast.model.vision.inputs import VisionInputs

# What PaddedRows are read from, beside the tensors of images.
_SOURCES = ("input_ids", "attention_mask", "completion_mask")


class RowsBatch(dict[str, Any]):
    """trl's batch with trl's keys. Its PaddedRows follow it to devices and processes, and are no entry of it.

    Rows describe the tensors that they were read from: a batch whose tensors were replaced or written to has none.
    """

    def __init__(self, tensors: Mapping[str, Any], rows: PaddedRows | None = None) -> None:
        """Keep trl's tensors, and the rows that were read from them."""
        super().__init__(tensors)
        images = () if rows is None or rows.media is None else sorted(self.keys() - set(_SOURCES))
        self._sources = (*_SOURCES, *images)
        self._rows, self._read = rows, self._state()

    @property
    def rows(self) -> PaddedRows | None:
        """The padded rows on the CPU, or None where these tensors are not those that they were read from."""
        same = all(a is b and x == y for (a, x), (b, y) in zip(self._read, self._state(), strict=True))
        return self._rows if same else None

    def _state(self) -> list[tuple[Any, object]]:
        """The tensors, and how often each was written to.

        Inference tensors do not say that, nor what accelerate puts in a tensor's place: they never equal themselves.
        """
        return [(value, value._version if _counts(value) else object()) for value in map(self.get, self._sources)]

    def to(self, device: Any, non_blocking: bool = False) -> RowsBatch:
        """The batch with its tensors on the device."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RowsBatch:
        """The batch in page-locked memory, for torch's DataLoader."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> RowsBatch:
        moved = {name: move(value) if isinstance(value, Tensor) else value for name, value in self.items()}
        return RowsBatch(moved, self.rows)

    def __missing__(self, name: str) -> Any:
        if name == ROWS_KEY:
            return self.rows
        raise KeyError(name)

    def __reduce__(self) -> Any:
        return RowsBatch, (dict(self), self.rows)


def _counts(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.is_inference()


class RowsCollator(DataCollatorForPreference):  # type: ignore[misc]
    """DataCollatorForPreference whose batches know their rows."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The padded batch."""
        batch = super().torch_call(examples)
        return RowsBatch(batch, _rows_of(batch))


class VisionRowsCollator(DataCollatorForVisionPreference):  # type: ignore[misc]
    """DataCollatorForVisionPreference whose batches know their rows, and their images.

    Attributes:
        inputs: what the model takes, set once its trainer is built; None where its images are not packed.
    """

    inputs: VisionInputs | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The padded batch."""
        batch = super().torch_call(examples)
        rows = _rows_of(batch)
        if self.inputs is not None:
            with contextlib.suppress(ValueError):  # the model's call raises it, where trl says why
                rows = rows.with_media(self.inputs, batch)
        return RowsBatch(batch, rows)


def _rows_of(batch: Mapping[str, Any]) -> PaddedRows:
    return PaddedRows.from_tensors(batch["input_ids"], batch["attention_mask"], batch["completion_mask"] != 0)
