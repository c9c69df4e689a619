"""An image that no row has, for batches without images in a run where calls of the vision tower are collectives.

Where weights are sharded, a rank that does not call the vision tower leaves the others waiting inside it. A batch with
an idle image calls it as one with images does, and what it returns counts zero times.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dpofast.model.parts import base_causal_lm
from dpofast.model.vision.example import random_image
from dpofast.model.vision.families import family_of, image_token_id
from dpofast.packing.batch import PackedBatch
from dpofast.packing.media import BatchMedia


def idle_image(model: Any) -> BatchMedia:
    """The media, on the CPU, of a row of no positions beside one small image, for a composite that takes images."""
    config = base_causal_lm(model).config
    family = family_of(config)
    assert family is not None
    processed = random_image(config, torch.Generator().manual_seed(0))
    inputs = {name: tensor[0] if family.nested else tensor for name, tensor in processed.items()}
    return BatchMedia(
        token_id=image_token_id(config),
        inputs=inputs,
        shapes={name: tensor for name, tensor in inputs.items() if not tensor.is_floating_point()},
        counts={name: (len(tensor),) for name, tensor in inputs.items()},
        num_tokens=(1,),
        image_of_row=torch.empty(0, dtype=torch.int64),
    )


def with_idle_image(batch: PackedBatch, image: BatchMedia) -> PackedBatch:
    """The batch, where it has no images with this one, in the place of none of its rows."""
    if batch.media is not None:
        return batch
    return replace(batch, media=replace(image, image_of_row=torch.full((batch.num_tokens,), -1)))
