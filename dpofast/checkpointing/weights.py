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
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def saved_once(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict with tied weights under one name: gathering makes them separate tensors."""
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    return {name: tensor for name, tensor in state.items() if name not in tied}


def stored_names(model: Any) -> dict[str, str]:
    """Returns the names of the weights in a checkpoint (of an adapter, only the adapter's), and the model's own."""
    names: dict[str, Any] = {name: name for name in saved_once(model, model.state_dict())}
    if hasattr(model, "peft_config"):  # PEFT's own rule, applied to names: those in the file, and the model's
        from peft import get_peft_model_state_dict

        adapter = model.active_adapter
        return get_peft_model_state_dict(model, names, adapter_name=adapter, save_embedding_layers=False)
    return names


def load_converted(model: Any, folder: str) -> bool:
    """Load converted_weights() into a model that is whole on this rank, in place. Returns whether there were any."""
    state = converted_weights(model, folder)
    if state is not None:
        model.load_state_dict(state)
    return state is not None


def converted_weights(model: Any, folder: str) -> dict[str, Tensor] | None:
    """The whole weights of a checkpoint by the model's own names, where its files have other names.

    Args:
        model: of transformers, whole or sharded by FSDP2.
        folder: a checkpoint.

    Returns:
        None for any other checkpoint, and for an adapter's.

    Raises:
        ValueError: the files lack weights of the model, or have others.
    """
    own = model.state_dict()
    if hasattr(model, "peft_config") or names_in(folder) <= own.keys():
        return None
    # a cast to the widest dtype and back to the weight's own loses nothing
    floating = [tensor.dtype for tensor in own.values() if tensor.is_floating_point()]
    # fully_shard puts classes of its own in front
    plain: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    loaded, found = plain.from_pretrained(
        folder, dtype=reduce(torch.promote_types, floating), use_safetensors=True, output_loading_info=True
    )
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    if wrong:
        raise ValueError(
            f"{folder}: expected the weights of {type(model).__name__} in its safetensors, {len(wrong)} are missing or "
            f"unknown: {', '.join(wrong[:3])}"
        )
    return dict(loaded.state_dict())


def names_in(folder: str) -> set[str]:
    """The names of the weights in a checkpoint's model files; none for an adapter's folder."""
    names: set[str] = set()
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names
