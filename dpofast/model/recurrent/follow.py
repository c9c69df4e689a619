"""Recurrent layers that follow the segments of a packed row, where the package tree-recurrence can hook them.

A recurrent layer scans a row in order, so the end of one branch would run on into the next. Its hooks stand before the
convolution and the recurrence that such a layer calls in its module of transformers: a segment begins with the state
and the last inputs of its parent. They read the segments from two arguments of the backbone's call, and pass every
other call through.

The hooks are those of a whole module, whose models share them: the last one that is detached takes them off.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dpofast.model.checks.support import cannot_pack, is_recurrent
from dpofast.model.parts import backbone_of
from dpofast.model.recurrent.families import register_families
from dpofast.model.wrappers import drop_hooks
from dpofast.packing.segments import Segments

_MODE = "_dpofast_recurrence"  # an attribute of the model: "tree" or "chains", as tree-recurrence has it


def follow_segments(model: Any) -> None:
    """Hook the recurrent layers of a model's backbone; nothing where it has none.

    Raises:
        CannotPack: tree-recurrence is not installed, or cannot hook these layers.
    """
    if not is_recurrent(model):
        return
    if find_spec("tree_recurrence") is None:
        raise cannot_pack(
            model,
            "it carries a state from token to token, and what takes a state along the branches of a packed row, for "
            "many such models, is not installed: pip install 'dpofast[hybrid]'",
        )
    import tree_recurrence

    register_families()
    support = tree_recurrence.install(backbone_of(model))
    vars(model)[_MODE] = support.mode
    if support.mode == "none" or not support.owners:
        stop_following_segments(model)
        raise cannot_pack(
            model,
            "it carries a state from token to token, which tree-recurrence cannot take along the branches of a packed "
            f"row ({support.reason.partition(';')[0]})",
        )


def stop_following_segments(model: Any) -> None:
    """Undo follow_segments."""
    if vars(model).pop(_MODE, None) is not None:
        import tree_recurrence

        tree_recurrence.uninstall(backbone_of(model))
        _drop_call_hooks(model)


def follow_again(model: Any) -> None:
    """Hook the layers of a copy or of an unpickled model, which tree-recurrence has not seen."""
    if _MODE in vars(model):
        _drop_call_hooks(model)
        follow_segments(model)


def _drop_call_hooks(model: Any) -> None:
    """Take off tree-recurrence's hooks on modules, which a copy has beside its own: they turn caches off."""
    drop_hooks(model, lambda hook: getattr(hook, "__module__", "").startswith("tree_recurrence."))


def segment_arguments(model: Any, segments: Segments) -> dict[str, Tensor]:
    """The arguments of the backbone's call that the hooks read; {} for a model without recurrent layers."""
    if _MODE not in vars(model):
        return {}
    cu_seqlens, parents = segments.cu_seqlens_q, segments.parents
    if not shares_rows(model):  # the cuts that sharing has left in a sequence are no boundaries
        cu_seqlens, parents = torch.cat((cu_seqlens[:-1][parents < 0], cu_seqlens[-1:])), parents[parents < 0]
    return {"tree_cu_seqlens_q": cu_seqlens, "tree_segment_parents": parents}


def shares_rows(model: Any) -> bool:
    """Whether the model's layers allow sequences to share rows: all that follow branches, not only boundaries."""
    return bool(vars(model).get(_MODE) != "chains")


def one_kind_each(lengths: Tensor) -> Tensor:
    """Kinds (S,) of sequences of lengths (S,) by which split_by_kind shares no rows."""
    return torch.arange(len(lengths))


def is_recurrent_layer(layer: Any) -> bool:
    """Whether a layer contains modules whose functions tree-recurrence has hooked or may hook."""
    if find_spec("tree_recurrence") is None:
        return False
    from tree_recurrence.registry import mixer_family

    return any(mixer_family(type(module).__name__) is not None for module in layer.modules())
