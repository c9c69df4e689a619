"""split_prompts: the same batch with fewer shared prompts, for models in which a prompt depends on its response."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dpofast.packing.batch import PackedBatch, Segments


def split_prompts(batch: PackedBatch, kinds: Tensor) -> PackedBatch:
    """A batch of the same sequences, targets and pairs, in which only sequences of one kind share a prompt.

    Args:
        batch: on any device; its indices are read back from there.
        kinds: (S,) integers on the CPU.
    """
    positions, logit_rows, bounds = batch.position_ids.cpu(), batch.logit_rows.cpu(), batch.cu_targets.tolist()
    groups: dict[tuple[int, int], list[int]] = {}
    for sequence, kind in enumerate(kinds.tolist()):
        groups.setdefault((int(logit_rows[bounds[sequence]]), kind), []).append(sequence)  # the prompt's last row
    if len(groups) == len({last for last, _ in groups}):
        return batch
    source, cu_seqlens, prefixes, moved = [], [0], [], torch.empty_like(logit_rows)
    rows = 0
    for (last, _), members in groups.items():
        size = int(positions[last]) + 1
        source.append(torch.arange(last - size + 1, last + 1))
        prompt = (rows, rows + size)
        rows += size
        for index, sequence in enumerate(members):
            start, stop = bounds[sequence], bounds[sequence + 1]
            own = stop - start - 1
            source.append(logit_rows[start + 1 : stop])
            moved[start], moved[start + 1 : stop] = prompt[1] - 1, torch.arange(rows, rows + own)
            rows += own
            if index == 0 or own:
                cu_seqlens.append(rows)
                prefixes.append(prompt if index else (0, 0))
    kept = torch.cat(source).to(batch.input_ids.device)
    return replace(
        batch,
        input_ids=batch.input_ids[kept],
        position_ids=batch.position_ids[kept],
        logit_rows=moved.to(batch.logit_rows.device),
        segments=Segments(torch.tensor(cu_seqlens, dtype=torch.int32), torch.tensor(prefixes, dtype=torch.int32)),
    )


def prompt_rows_follow(values: Tensor) -> Tensor:
    """Values (T,) of rows that predict a target, 0 elsewhere: a prompt's other rows take that of its last row."""
    rows = torch.arange(len(values), device=values.device)
    following = torch.where(values > 0, rows, len(values)).flip(0).cummin(0).values.flip(0)
    return values[following]
