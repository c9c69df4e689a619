"""Compiles a model's decoder layers one by one, in place.

A layer's class is exchanged for a subclass whose forward is compiled. Layers of one class share its graphs: they are
traced once, whatever their number. Gradient checkpointing stays outside of what is compiled (inside, as transformers
puts it, torch.compile would leave the whole layer uncompiled without a word). So does packed attention, the one graph
break of a layer: its layout is another for every batch. Lengths are dynamic from the second batch on.

Names of weights, hooks, adapters and plain calls (generation, logits) stay as they are; a deepcopy is compiled too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

from dpofast.model.attention.layout import layout_of
from dpofast.model.parts import backbone_of, base_causal_lm
from dpofast.model.recurrent.follow import is_recurrent_layer
from dpofast.model.wrappers import UNCOMPILED, exchange_class


class _Compiled:
    """Base of the classes that _compiled_class makes, which pickle and deepcopy are told how to make again."""

    _made_from: tuple[Any, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, self._made_from, self.__dict__


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated layers of a causal language model's backbone; [] where they are not transformers' own."""
    backbone = backbone_of(base_causal_lm(model))
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


def layers_to_compile(model: Any, *, padded: bool) -> list[nn.Module]:
    """The decoder layers without those that follow a packed row by hooks, which compute on the host in each forward."""
    return [layer for layer in decoder_layers(model) if padded or not is_recurrent_layer(layer)]


def compile_layers(model: Any, *, backend: str, mode: str | None, padded: bool) -> None:
    """Compile the decoder layers of a model with an attached log-prob head: those of layers_to_compile.

    Args:
        model: changed in place.
        backend: torch.compile's.
        mode: torch.compile's.
        padded: the model runs over padded rows, whose calls are not to be told from plain ones: all are compiled.

    Raises:
        ValueError: the model has no layers to compile.
    """
    layers = layers_to_compile(model, padded=padded)
    if not layers:
        raise ValueError(
            "torch_compile: expected a model of transformers' repeated layers (GradientCheckpointingLayer), which are "
            f"compiled one by one, and {type(model).__name__} has none, or none but recurrent ones, which run as they "
            "are: leave it off"
        )
    uncompile_layers(model)
    # Else torch tries the graph that ran last first, and a checkpointed layer may be recomputed by another one than ran
    # forward, as DiffLlama's are, which differ in a constant: github.com/pytorch/pytorch/issues/166926
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
    for layer in layers:
        cls: Any = type(layer)
        exchange_class(layer, _compiled_class(cls, backend, mode, padded))


def uncompile_layers(model: Any) -> None:
    """Undo compile_layers: an earlier trainer may have compiled them, with other options."""
    for layer in decoder_layers(model):
        if isinstance(layer, _Compiled):
            exchange_class(layer, layer._made_from[0])


@functools.cache
def _compiled_class(cls: Any, backend: str, mode: str | None, padded: bool) -> type:
    # transformers 5.23 checkpoints inside forward: what it wrapped is compiled, and the subclass is wrapped anew
    plain = inspect.unwrap(cls.forward, stop=lambda f: f.__code__.co_name != "forward_with_checkpointing")
    compiled = torch.compile(plain, backend=backend, mode=mode)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        packed = "packed_layout" in kwargs or layout_of(kwargs.get("attention_mask")) is not None
        if UNCOMPILED.get() or not (padded or packed):
            return plain(self, *args, **kwargs)
        with explained_compile_errors():
            return compiled(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    members = {
        "forward": forward,
        "_made_from": (cls, backend, mode, padded),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (_Compiled, cls), members)


def _rebuilt(*made_from: Any) -> Any:
    compiled: Any = _compiled_class(*made_from)
    return compiled.__new__(compiled)


@contextlib.contextmanager
def explained_compile_errors() -> Iterator[None]:
    """Inside, an error of the compiler says what to do; around a forward, and a backward, which may compile too.

    Raises:
        RuntimeError: a layer cannot be compiled.
        torch.OutOfMemoryError: memory ran out meanwhile, as it may in any step.
    """
    try:
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", None) or error.__cause__
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        raise RuntimeError(
            "torch_compile: the model's layers could not be compiled on this machine; nothing was run uncompiled "
            "instead. Set torch_compile=False (--torch_compile false), or on a GPU use_liger_kernel=True. The compiler "
            f"says: {error}"
        ) from error
