"""What other libraries put over a module's forward, on the instance, where it hides the forward of the module's class.

The log-prob head is attached by exchanging classes, so an instance's own `forward` has to come off or to call the new
class's. Five kinds are known, each recognized by the code that made it:

    accelerate's autocast     after any Trainer(bf16=True): taken off; the next trainer puts on its own
    accelerate's hooks        device_map, dispatch_model, offloading: kept, and pointed at the new class's forward
    trl's fused LM head       after trl's SFTTrainer or DPOTrainer: taken off, since the head is fused here
    Liger's fused loss        use_liger_kernel: taken off for the same reason; its fused layers stay
    tensor parallelism        transformers' tp_plan: made anew around the new class's forward (parallel/tensor.py)
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from dpofast.model.parallel.tensor import take_off_split

# Whether layers that training compiles run uncompiled: the parity check sets it.
UNCOMPILED: ContextVar[bool] = ContextVar("UNCOMPILED", default=False)
# Where accelerate's hook keeps the forward that it calls.
_HOOKED = "_old_forward"


def drop_hooks(model: nn.Module, ours: Callable[[Any], bool]) -> None:
    """Take off the forward hooks and pre-hooks of a model's modules for which ours(hook) holds.

    Found by what they are: a copy has the hooks of its original, and nobody has their handles.
    """
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if ours(hook)]:
                del hooks[key]
                with_kwargs.pop(key, None)


def exchange_class(module: Any, new: type) -> None:
    """Give a module another class whose forward then runs, also inside accelerate's hooks.

    Raises:
        ValueError: a forward on the instance that is of no known kind, by name.
    """
    take_off_autocast(module)
    split = take_off_split(module)
    own = _own_functions(module)
    for name in ("forward", _HOOKED):
        forward = vars(module).get(name)
        while forward is not None and not _is_hook(module, forward) and _function(forward) not in own:
            forward = _beneath(module, forward)
        if _is_hook(module, forward):
            module.forward = forward
        elif name == "forward":
            vars(module).pop("forward", None)
    module.__class__ = new
    if _HOOKED in vars(module):
        module._old_forward = types.MethodType(type(module).forward, module)
    if split is not None:
        split.install(module)


def take_off_autocast(module: Any) -> bool:
    """Take off accelerate's autocast, and let accelerate prepare the module again. Returns whether there was one.

    accelerate prepares a model once: another trainer would train in the mixed precision of the first, or in none.
    """
    module.__dict__.pop("_is_accelerate_prepared", None)
    module.__dict__.pop("_original_forward", None)
    found = False
    while _is_autocast(forward := vars(module).get("forward")):
        found = True
        beneath = _function(forward).__wrapped__.model_forward.__wrapped__
        if _function(beneath) in _own_functions(module):
            del module.forward
        else:
            bound = isinstance(beneath, types.MethodType | functools.partial)
            module.forward = beneath if bound else types.MethodType(beneath, module)
    return found


def is_dispatched(module: Any) -> bool:
    """Whether accelerate placed the module's weights and moves its inputs, so that nothing else may move them."""
    return "_hf_hook" in vars(module)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes token ids: the device of its input embeddings, where accelerate runs offloaded ones."""
    words: Any = model.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = words.weight.device
    hook = vars(words).get("_hf_hook")
    if device.type == "meta" and hook is not None:
        return torch.device(hook.execution_device)
    return device


def _beneath(module: Any, forward: Any) -> Any:
    """What a known wrapper calls, or None for the forward of the class."""
    function = _function(forward)
    home = getattr(function, "__globals__", {}).get("__name__", "")
    if home == "trl.trainer.utils" and "original_forward" in function.__code__.co_freevars:
        return inspect.getclosurevars(function).nonlocals["original_forward"]
    if (getattr(function, "__module__", None) or "").startswith("liger_kernel."):
        return None
    name = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__name__)}"
    raise ValueError(
        f"{type(module).__name__}: expected its class's forward, got one set on the instance ({name}), which dpofast "
        "would pass over: load the model anew from its folder, or delete the attribute (del module.forward) where the "
        "class's forward is right"
    )


def _is_autocast(forward: Any) -> bool:
    return getattr(_function(forward), "__qualname__", "") == "convert_outputs_to_fp32.<locals>.forward"


def _is_hook(module: Any, forward: Any) -> bool:
    """Whether this is accelerate's call of a module's hooks around _old_forward."""
    return isinstance(forward, functools.partial) and forward.args[:1] == (module,) and _HOOKED in vars(module)


def _function(forward: Any) -> Any:
    """The function of a bound method; accelerate binds bound methods again."""
    while isinstance(forward, types.MethodType):
        forward = forward.__func__
    return forward


def _own_functions(module: Any) -> set[Any]:
    """The functions of the class's forward, its decorators' included: accelerate binds the innermost of them."""
    functions, forward = set(), type(module).forward
    while forward is not None:
        functions.add(forward)
        forward = getattr(forward, "__wrapped__", None)
    return functions
