"""trl's collator for preference pairs, which also reads the padded rows (PaddedRows) while they are on the CPU.

Reading them later from tensors on a device would be a sync at every step. The class has a module of its own, so that
data-loading workers can unpickle it.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpofast.integrations._trl.rows import ROWS_KEY, PaddedRows


class RowsCollator(DataCollatorForPreference):  # type: ignore[misc]
    """DataCollatorForPreference with one more key, which accelerate leaves on the CPU."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The padded batch and its PaddedRows."""
        output = super().torch_call(examples)
        output[ROWS_KEY] = PaddedRows.from_tensors(
            output["input_ids"], output["attention_mask"], output["completion_mask"] != 0
        )
        return output
