"""Positions of a packed row with images, by the model's own rule for one sequence (get_rope_index, multimodal RoPE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast.model.parts import whole_backbone
from dpofast.model.vision.families import family_of
from dpofast.packing.batch import PackedBatch


def has_own_positions(model: Any) -> bool:
    """Whether the model has a rule of its own for positions of sequences with images."""
    return hasattr(whole_backbone(model), "get_rope_index")


def own_positions(model: Any, batch: PackedBatch) -> Tensor:
    """Position ids (3, 1, T) of a packed row, on its device: those of each path from a root to a leaf, run alone.

    A row's position depends on what stands before it, so rows that sequences share have one. Nothing is read back from
    the device: ids of text do not matter to the rule, and the images are described on the CPU.
    """
    media, runs = batch.media, batch.segments.runs
    assert media is not None
    family = family_of(model.config)
    assert family is not None and family.token_types is not None
    positions = batch.segments.positions().expand(3, -1).clone()
    for rows in runs.key_rows().split(runs.cu_seqlens_k.diff().tolist()):
        images = media.images_in(rows)
        if images:
            kinds = (media.image_of_row[rows] >= 0).long()[None]
            grids = media.shapes_of(images)["image_grid_thw"]
            own, _ = whole_backbone(model).get_rope_index(
                torch.zeros_like(kinds), **{family.token_types: kinds}, image_grid_thw=grids
            )
            positions[:, rows] = own[:, 0]
    return positions[:, None].to(batch.input_ids.device, non_blocking=True)
