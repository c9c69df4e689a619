"""Families of recurrent layers that tree-recurrence 0.1 does not list, registered with it.

Falcon-H1's, Zamba2's and LFM3's layers call the same functions of their modules as Mamba2's and LFM2's, which it can
hook. The recurrence of Kimi Delta Attention (Kimi Linear, Ling 3) takes the arguments of the gated delta rule, with a
decay for each channel in the place of one for each head, and is hooked alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

# tree-recurrence's family: (model types, classes of their recurrent layers, entries of layer_types) to add to it
_ALIKE = {
    "mamba2": (("falcon_h1", "zamba2"), ("FalconH1Mixer", "Zamba2MambaMixer"), ("hybrid",)),
    "short_conv": (("lfm3",), ("Lfm3ShortConv",), ()),
}
_DELTA_ATTENTION = ("kimi_linear", "bailing_hybrid"), ("KimiLinearDeltaAttention", "BailingHybridDeltaAttention")


def register_families() -> None:
    """Add the families to tree-recurrence's; those that it lists itself, as a later release may, stay as they are."""
    from tree_recurrence import TreeFamily, families, register_family

    known = {mixer for family in families() for mixer in family.mixers}
    for family in families():
        types, mixers, layer_types = _ALIKE.get(family.name, ((), (), ()))
        if mixers and not known.intersection(mixers):
            added = replace(
                family,
                model_types=(*family.model_types, *types),
                mixers=(*family.mixers, *mixers),
                layer_types=(*family.layer_types, *layer_types),
            )
            if family.name == "short_conv" and family.install:
                added = replace(added, install=partial(_hook_convolution, family.install))
            register_family(added)
    types, mixers = _DELTA_ATTENTION
    if not known.intersection(mixers):
        register_family(TreeFamily("delta_attention", types, mixers, ("linear_attention",), install=_hook_delta_rule))


def _hook_delta_rule(modeling: Any, context: Any) -> str:
    """Hook a module of transformers with Kimi Delta Attention; the arguments and the result are tree-recurrence's."""
    hooks = {"causal_conv1d_fn": "_conv_hook", "chunk_kimi_delta_attention": "_gated_delta_rule_hook"}
    return _hook_functions(modeling, context, hooks)


def _hook_convolution(layerwise: Callable[..., str], modeling: Any, context: Any) -> str:
    """Hook the convolution that LFM2's layers call, where these hand it the arguments of the backbone's call.

    Those of transformers 5.20 and older do not. There tree-recurrence exchanges a layer's forward for each call, which
    two threads cannot do at once.
    """
    kinds = [{p.kind for p in signature(cls.forward).parameters.values()} for cls in context.mixer_classes]
    if all(Parameter.VAR_KEYWORD in kind for kind in kinds):
        return _hook_functions(modeling, context, {"causal_conv1d_fn": "_conv_hook"})
    return layerwise(modeling, context)


def _hook_functions(modeling: Any, context: Any, hooks: dict[str, str]) -> str:
    """Put tree-recurrence's hooks, by name, before functions of a module that its recurrent layers call."""
    from tree_recurrence.integrations import transformers as own

    own._require(modeling, context.mixer_classes, tuple(hooks))
    state = own._state(modeling, context)
    for name, hook in hooks.items():
        state.add(own.install_hook(modeling, name, getattr(own, hook)))
    return "tree_recurrence"
