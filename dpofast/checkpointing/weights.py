"""Whole weights whose files have other names, or other tensors, than the model: those of mixtures of experts and VLMs.

save_pretrained writes such models as earlier versions of transformers did (an expert a tensor, language_model.model for
model.language_model), which from_pretrained alone converts. Trainer would load the files by the model's own names, find
none of them, warn, and go on with the weights that the model has.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def load_converted(model: Any, folder: str) -> bool:
    """Load the weights of a checkpoint into a model, in place, where their files name others than the model has.

    Args:
        model: of transformers, whole on this rank.
        folder: a checkpoint.

    Returns:
        Whether it was such a checkpoint; nothing was loaded from any other, nor from an adapter's.

    Raises:
        ValueError: the files lack weights of the model, or have others.
    """
    own = model.state_dict()
    if hasattr(model, "peft_config") or names_in(folder) <= own.keys():
        return False
    # a cast to the widest dtype and back to the weight's own loses nothing
    floating = [tensor.dtype for tensor in own.values() if tensor.is_floating_point()]
    loaded, found = type(model).from_pretrained(
        folder, dtype=reduce(torch.promote_types, floating), use_safetensors=True, output_loading_info=True
    )
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    if wrong:
        raise ValueError(
            f"{folder}: expected the weights of {type(model).__name__} in its safetensors, {len(wrong)} are missing or "
            f"unknown: {', '.join(wrong[:3])}"
        )
    model.load_state_dict(loaded.state_dict())
    return True


def names_in(folder: str) -> set[str]:
    """The names of the weights in a checkpoint's model files; none for an adapter's folder."""
    names: set[str] = set()
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names
