"""Families of recurrent layers that tree-recurrence 0.1 does not list, registered with it.

Falcon-H1's, Zamba2's and LFM3's layers call the same functions of their modules as Mamba2's and LFM2's, which it can
hook. The recurrence of Kimi Delta Attention (Kimi Linear, Ling 3) takes the arguments of the gated delta rule, with a
decay for each channel in the place of one for each head, and is hooked alike.
"""

from __future__ import annotations

from dataclasses import replace
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
        if not known.intersection(mixers):
            register_family(
                replace(
                    family,
                    model_types=(*family.model_types, *types),
                    mixers=(*family.mixers, *mixers),
                    layer_types=(*family.layer_types, *layer_types),
                )
            )
    types, mixers = _DELTA_ATTENTION
    if not known.intersection(mixers):
        register_family(TreeFamily("delta_attention", types, mixers, ("linear_attention",), install=_hook_module))


def _hook_module(modeling: Any, context: Any) -> str:
    """Hook a module of transformers with Kimi Delta Attention; the arguments and the result are tree-recurrence's."""
    from tree_recurrence.integrations import transformers as hooks

    convolution, recurrence = names = ("causal_conv1d_fn", "chunk_kimi_delta_attention")
    hooks._require(modeling, context.mixer_classes, names)
    state = hooks._state(modeling, context)
    state.add(hooks.install_hook(modeling, convolution, hooks._conv_hook))
    state.add(hooks.install_hook(modeling, recurrence, hooks._gated_delta_rule_hook))
    return "tree_recurrence"
