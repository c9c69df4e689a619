"""The LM head of a batch whose rows are split over several processes: each computes its own targets' log-probs.

They are gathered as N numbers, so that every process computes the same loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from dpofast.head.options import LogprobOutput
from dpofast.model.parallel.exchange import all_targets
from dpofast.packing.parallel.row_split import RowSplit


def of_all_targets(own: LogprobOutput, split: RowSplit) -> LogprobOutput:
    """The output of all N targets from that of this process's N_r, statistics included. A collective."""
    values = {field.name: value for field in fields(own) if (value := getattr(own, field.name)) is not None}
    dtype = own.logps.dtype
    gathered = all_targets(torch.stack([value.to(dtype) for value in values.values()]), split)
    return replace(own, **{name: row.to(values[name].dtype) for name, row in zip(values, gathered, strict=True)})
