"""Packed attention in model families whose attention is a method and no call of transformers' AttentionInterface.

GPT-J, CodeGen, GPT-Neo and GPT-NeoX Japanese have _attn(query, key, value, attention_mask) over (1, H, T, Dh). The
method of their class is wrapped once a process: a mask with a layout goes to packed attention, and any other to the
method as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dpofast.model.attention.layout import AttentionOptions, layout_of


def _plain(module: Any) -> AttentionOptions:
    dropout = module.attn_dropout if hasattr(module, "attn_dropout") else module.attention_dropout
    return AttentionOptions(dropout=dropout.p if module.training else 0.0)


def _gpt_neo(module: Any) -> AttentionOptions:
    """It does not scale its scores, and its local layers see a window."""
    window = module.config.window_size if module.attention_type == "local" else None
    return AttentionOptions(scaling=1.0, window=window, dropout=module.attn_dropout.p if module.training else 0.0)


_OPTIONS: dict[str, Callable[[Any], AttentionOptions]] = {
    "transformers.models.codegen.modeling_codegen.CodeGenAttention": _plain,
    "transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": _gpt_neo,
    "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": _plain,
    "transformers.models.gptj.modeling_gptj.GPTJAttention": _plain,
}
_WRAPPED = "_dpofast_wrapped"  # an attribute of the method


def has_attention_method(backbone: nn.Module) -> bool:
    """Whether a backbone attends by a method that wrap_methods knows."""
    return any(_name(type(module)) in _OPTIONS for module in backbone.modules())


def wrap_methods(backbone: nn.Module, attend: Callable[..., Tensor]) -> None:
    """Let the attention methods of a backbone's classes take packed layouts.

    Args:
        backbone: a model's.
        attend: called with query, key, value, layout and options; (1, T, H, Dh).
    """
    classes: set[Any] = {type(module) for module in backbone.modules() if _name(type(module)) in _OPTIONS}
    for cls in classes:
        if not hasattr(cls._attn, _WRAPPED):
            cls._attn = _wrapped(cls._attn, _OPTIONS[_name(cls)], attend)


def _wrapped(method: Any, options: Callable[[Any], AttentionOptions], attend: Callable[..., Tensor]) -> Any:
    @functools.wraps(method)
    def _attn(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        layout = layout_of(attention_mask)
        if layout is None:
            return method(self, query, key, value, attention_mask)
        # rotary tables in float32 leave queries and keys wider than values
        query, key = query.to(value.dtype), key.to(value.dtype)
        return attend(query, key, value, layout, options(self)).transpose(1, 2), None

    setattr(_attn, _WRAPPED, True)
    return _attn


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
