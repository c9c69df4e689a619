"""Layers of indexed_attention (DeepSeek-V3.2's sparse attention, arXiv 2512.02556) in packed rows.

An indexer scores all earlier tokens, and a query attends to the index_topk best. Up to that length these are its whole
history, so that the layer is one of full attention, and its indexer, which scores every pair of the T packed rows and
whose weights have no gradient here, is not needed: a hook leaves it one row. Longer sequences are refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dpofast.model.wrappers import drop_hooks

_LAYER_TYPES = {"indexed_attention", "deepseek_sparse_attention"}
# Implementations for which the layers fold the selection into the mask, and do not pass it on as an argument.
_BY_MASK = ("eager", "sdpa")


def check_whole_histories_selected(model: Any, positions: int) -> None:
    """Refuse sequences of which an indexer would select a part.

    Args:
        model: an attached model.
        positions: of the longest sequence.

    Raises:
        ValueError: they are more than index_topk.
    """
    config = model.config.get_text_config()
    indexed = _LAYER_TYPES.intersection(getattr(config, "layer_types", None) or ())
    if indexed and positions > config.index_topk:
        raise ValueError(
            f"{type(model).__name__}: a prompt with its response has {positions} positions, of which its "
            f"{indexed.pop()} layers select {config.index_topk} (index_topk), and packed rows have no selection: "
            f"cut the data to max_length={config.index_topk}, or run padded rows (padded=True)"
        )


def skip_indexers(backbone: nn.Module) -> None:
    """Hook the indexers, so that they read one row of a packed call; plain calls are unchanged."""
    for module in backbone.modules():
        if hasattr(module, "index_topk") and _one_row not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_one_row, with_kwargs=True)


def run_indexers(backbone: nn.Module) -> None:
    """Undo skip_indexers."""
    drop_hooks(backbone, lambda hook: hook is _one_row)


def selection_in_mask(
    mask: Tensor | None, options: dict[str, Any], keys: int, former: str
) -> tuple[Tensor | None, dict[str, Any]]:
    """The mask and options of a plain call as a layer makes them itself for the implementation called former.

    Under the name of packed attention it passes the selection, indices (B, S, k), on as an option.
    """
    indices = options.get("indices")
    if indices is None or mask is None or former not in _BY_MASK:
        return mask, options
    chosen = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask.dtype == torch.bool:
        mask = mask & chosen
    else:
        mask = mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
    return mask, {**options, "indices": None}


def _one_row(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A forward pre-hook: of every input (1, T, ...) the first row, where the mask is that of a packed call."""
    mask = inspect.signature(module.forward).bind(*args, **options).arguments["attention_mask"]
    return tree_map_only(Tensor, lambda part: part[:, :1], (args, options)) if mask.numel() == 1 else None
