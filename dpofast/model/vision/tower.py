"""Which weights of a composite model are its vision tower's: what turns pixels into features, below the projector."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpofast.model.parts import base_causal_lm, whole_backbone

_TOWERS = ("visual", "vision_tower", "vision_model")
# Inside a tower, what turns its features into embeddings: Qwen's and GLM's projectors.
_PROJECTORS = ("merger", "deepstack_merger_list", "downsample")


def vision_tower(model: Any) -> nn.Module:
    """The vision tower of a model of a family that takes images, PEFT's wrapper allowed.

    Raises:
        ValueError: it has none of a known name.
    """
    backbone = whole_backbone(base_causal_lm(model))
    for name in _TOWERS:
        if isinstance(tower := getattr(backbone, name, None), nn.Module):
            return tower
    raise ValueError(f"{type(backbone).__name__}: expected a vision tower, {', '.join(_TOWERS)}, and it has none")


def tower_parameters(model: Any) -> list[nn.Parameter]:
    """The vision tower's weights, adapters on it included, without those of a projector inside it."""
    named = vision_tower(model).named_parameters()
    return [parameter for name, parameter in named if name.split(".")[0] not in _PROJECTORS]
