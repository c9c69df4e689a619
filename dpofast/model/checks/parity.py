"""Checks an attached model's log-probs against its own logits, on a few random ids, when the head is attached.

And again where another attention may run since: on another device, in another dtype.

What the rules of support.py do not know of shows here: an attention that ignores the layout, logits that are scaled in
an unknown way, a forward that is another one in train mode. 16-bit models are compared in float32 as well, where a
wrong mask cannot hide in rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from dpofast.common.eval_mode import eval_mode
from dpofast.head.linear_logprobs import linear_logprobs
from dpofast.model.attention.interface import segmentwise
from dpofast.model.checks.images import admit_images, forget_images
from dpofast.model.checks.support import CannotPack, cannot_pack
from dpofast.model.dropout import active_dropout, config_rates
from dpofast.model.forward import packed_hidden, padded_hidden
from dpofast.model.lm_head import KNOWN_LOGIT_ENTRIES, logit_options, logprob_head
from dpofast.model.parallel.zero import gathered_forwards
from dpofast.model.parts import base_causal_lm, text_token_ids, whole_backbone
from dpofast.model.vision.merge import own_logprobs
from dpofast.model.wrappers import UNCOMPILED, input_device
from dpofast.packing.batch import PackedBatch
from dpofast.packing.pack import pack

_PROMPT, _RESPONSES = 5, (4, 6)
# Largest |ours − its own| log-prob, nats; a wrong mask or a missing logit scale is off by 0.1.
PARITY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
# Pairs and forwards by which a model is tried that draws random numbers in train mode.
_PAIRS_OF_RANDOM, _DRAWS = 16, 4
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_CHECKED = "_parity_checked"  # a model's settings in which it has passed
# Config entries that families change their logits by.
_LOGIT_ENTRY = re.compile("(?<!attn_)logit(?!s_to_keep)|(?<!attn_)soft_?cap|mup|lm_head|output_mult|unpadded_vocab")


@torch.no_grad()
def check_parity(model: Any, padded: bool) -> None:
    """Compare model(packed=...) with log-probs from the model's own padded logits, in eval and in train mode.

    In train mode too, unless some dropout is on: the policy would differ from its reference by chance.

    Nothing is done where the model has passed in this setting: device, dtype, autocast on a GPU, attention.

    Raises:
        ValueError: log-probs that are not finite or that differ by more than PARITY_TOLERANCE.
    """
    setting = _setting(model)
    passed = vars(model).setdefault(_CHECKED, set())
    if setting in passed:
        return
    with eval_mode(model), _uncompiled_layers(model), gathered_forwards(model):
        _check_batch(model, _random_batch(model), padded)
        admit_images(model, padded, lambda examples: _check_batch(model, _packed(model, examples), padded))
    passed.add(setting)


@torch.no_grad()
def check_shards(model: Any, dtype: torch.dtype | None, largest: Callable[[float], float]) -> None:
    """Compare model(packed=...) with the model's own logits where forwards are collectives: all processes call this.

    Args:
        model: attached while it was whole, and sharded since. It is called as a whole, never a part of it.
        dtype: in which its weights are gathered; None: their own.
        largest: of all processes' values.

    Raises:
        ValueError: on every process, as check_parity's.
    """
    base, batch = base_causal_lm(model), _random_batch(base_causal_lm(model))
    tolerance = PARITY_TOLERANCE[dtype or computed_in(base)]
    with eval_mode(model), _uncompiled_layers(model):
        truth = own_logprobs(model, batch)
        for train in (False,) if active_dropout(base) else (False, True):
            model.train(train)
            own = float((model(packed=batch).logps - truth).abs().max())
            difference = largest(own if isfinite(own) else inf)
            if difference > tolerance:
                mode = "train mode" if train else "eval mode"
                raise ValueError(
                    f"{type(base).__name__}: packed log-probs of the sharded model in {mode} differ by "
                    f"{difference:.2g} nats from those of its own logits, more than {tolerance}: look for NaN and inf "
                    "in its weights, or train without fsdp"
                )


def _check_batch(model: Any, batch: PackedBatch, padded: bool) -> None:
    devices = _generator_devices(batch)
    before = _generator_states(devices)
    truth = _check_equal(model, batch, padded, lambda: model(packed=batch).logps, computed_in(model))
    if _drawn(before, devices):
        raise ValueError(
            f"{type(model).__name__}: its forward draws random numbers in eval mode too, as attention by hashing "
            "does, so that a sequence has no one log-prob: choose another model"
        )
    in_float32 = model.dtype in _SIXTEEN_BIT and _runs_in_float32(model, batch)
    if in_float32:
        with _in_float32():
            truth = _check_equal(model, batch, padded, lambda: _logps(model, batch, padded), torch.float32)
    if not active_dropout(model):
        _check_train_mode(model, batch, padded, truth, in_float32)


def forget_parity(model: Any) -> None:
    """Forget in which settings the model has passed."""
    vars(model).pop(_CHECKED, None)
    forget_images(model)


def computed_in(model: Any) -> torch.dtype:
    """The dtype that the model's attention and products have: autocast's on a GPU, or its weights'.

    On a CPU autocast changes neither the attention nor the kernels.
    """
    kind = input_device(model).type
    return torch.get_autocast_dtype(kind) if kind != "cpu" and torch.is_autocast_enabled(kind) else model.dtype


def _setting(model: Any) -> tuple[Any, ...]:
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return str(input_device(model)), model.dtype, computed_in(model), attention


@contextmanager
def _uncompiled_layers(model: Any) -> Iterator[None]:
    """Inside, layers run uncompiled: a few ids are not worth a compilation for their length."""
    token = UNCOMPILED.set(True)
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    calls = [module._compiled_call_impl for module in compiled]
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        UNCOMPILED.reset(token)
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call


def _random_batch(model: Any, pairs: int = 1) -> PackedBatch:
    return random_batch(model, pairs).to(input_device(model))


def random_batch(model: Any, pairs: int) -> PackedBatch:
    """So many pairs of random ids of text, 13 rows each, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    text = text_token_ids(model)
    examples = []
    for _ in range(pairs):
        draws = [torch.randint(0, len(text), (length,), generator=generator) for length in (_PROMPT, *_RESPONSES)]
        # Responses that differ in their first token are distinct branches, whatever the draw.
        draws[2][0] = (draws[1][0] + 1) % len(text)
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        examples.append({column: text[draw].numpy() for column, draw in zip(columns, draws, strict=True)})
    (batch,) = pack(examples)
    return batch


def _packed(model: Any, examples: list[dict[str, Any]]) -> PackedBatch:
    (batch,) = pack(examples)
    return batch.to(input_device(model))


def _check_equal(
    model: Any, batch: PackedBatch, padded: bool, compute: Callable[[], Tensor], dtype: torch.dtype
) -> Tensor:
    """The model's own log-probs of the batch, (N,), if those of compute() equal them."""
    name = type(model).__name__
    try:
        ours = compute()
    except CannotPack:
        raise
    except ValueError as error:  # a head of another width than the backbone's
        cause = _logit_cause(model)
        if cause is None:
            raise
        raise ValueError(f"{name}: its logits are not those of its head on its backbone's output: {cause}") from error
    truth = own_logprobs(model, batch)
    if not bool(truth.isfinite().all()):
        raise ValueError(
            f"{name}: its own log-probs are not finite on a few random ids: look for NaN and inf in its weights"
        )
    difference = float((ours - truth).abs().max())
    if difference <= PARITY_TOLERANCE[dtype]:
        return truth
    cause = _logit_cause(model)
    apart = f"differ by {difference:.2g} nats, more than {PARITY_TOLERANCE[dtype]}"
    if not padded and cause is None:
        raise cannot_pack(model, f"packed and padded log-probs of the same tokens {apart}")
    if cause is None:
        entries = ", ".join(f"{entry}={value}" for entry, value in _unknown_entries(model).items())
        cause = "its forward does more to the logits than dpofast knows of" + (
            entries and f"; its config has {entries}"
        )
    raise ValueError(f"{name}: log-probs from its backbone and its head {apart}, from those of its own logits: {cause}")


def _logit_cause(model: Any) -> str | None:
    """Why a model's logits are not its head's of its backbone's output, as far as that can be read off; else None."""
    if _sees_later_tokens(model):
        return "they depend on later tokens, so it is no causal language model (an encoder needs is_decoder=True)"
    backbone = {id(module) for module in whole_backbone(model).modules()}
    head = model.get_output_embeddings()
    between = [
        path
        for path, module in model.named_modules()
        if id(module) not in backbone and module is not head and any(True for _ in module.parameters(recurse=False))
    ]
    if between:
        return f"other layers with weights run between the two ({', '.join(between)})"
    return None


def _unknown_entries(model: Any) -> dict[str, Any]:
    """Entries of the config that by their names change logits, are not off, and are not known to logit_options."""
    config = model.config.get_text_config()
    return {
        name: value
        for name, value in config.to_dict().items()
        if _LOGIT_ENTRY.search(name) and name not in KNOWN_LOGIT_ENTRIES and type(value) in (int, float) and value != 1
    }


def _sees_later_tokens(model: Any) -> bool:
    ids = _random_batch(model).padded()[0][:1]
    whole, begin = (model(input_ids=part, use_cache=False).logits for part in (ids, ids[:, :-1]))
    difference = float((whole[:, : begin.shape[1]] - begin).abs().max())
    return difference > PARITY_TOLERANCE[model.dtype] / 20


def _logps(model: Any, batch: PackedBatch, padded: bool) -> Tensor:
    """(N,) log-probs through the backbone and the head, whose weight takes the dtype of the hidden states."""
    hidden = padded_hidden(model, batch) if padded else packed_hidden(model, batch)[0]
    options = logit_options(model.config.get_text_config())

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        bias = None if bias is None else bias.to(hidden.dtype)
        targets = batch.targets.to(weight.device)  # accelerate may place the head on a device of its own
        return linear_logprobs(hidden, weight.to(hidden.dtype), targets, bias=bias, **options)

    return logprob_head(model)(hidden, compute=compute)[0].to(batch.input_ids.device)


def _check_train_mode(model: Any, batch: PackedBatch, padded: bool, truth: Tensor, in_float32: bool) -> None:
    """Refuse a forward that in train mode is random, or another one than in eval mode.

    truth (N,) are the batch's log-probs in eval mode. Where the forward draws random numbers, more ids are tried,
    several times: a router that samples does so for few tokens.
    """
    tolerance = PARITY_TOLERANCE[torch.float32 if in_float32 else computed_in(model)]
    devices = _generator_devices(batch)

    def logps(batch: PackedBatch, *, train: bool) -> Tensor:
        model.train(train)
        with _in_float32() if in_float32 else nullcontext():
            return _logps(model, batch, padded)

    with torch.random.fork_rng(devices=devices):
        before = _generator_states(devices)
        difference = float((logps(batch, train=True) - truth).abs().max())
        if _drawn(before, devices):
            batch = _random_batch(model, _PAIRS_OF_RANDOM)
            truth = logps(batch, train=False)
            for _ in range(_DRAWS):
                difference = max(difference, float((logps(batch, train=True) - truth).abs().max()))
    if difference > tolerance:
        rates = config_rates(model)
        advice = f"set {', '.join(rates)} of its config to 0 where it reads them, or " if rates else ""
        raise ValueError(
            f"{type(model).__name__}: its log-probs in train mode differ by {difference:.2g} nats from those in eval "
            "mode although all dropout is off: something else in it is random, such as a router that samples its "
            f"experts, and policy and reference would differ by chance: {advice}choose another model"
        )


def _generator_devices(batch: PackedBatch) -> list[torch.device]:
    return [batch.input_ids.device] if batch.input_ids.is_cuda else []


def _drawn(before: list[Tensor], devices: list[torch.device]) -> bool:
    """Whether random numbers were drawn since the generators were in these states."""
    return not all(torch.equal(*states) for states in zip(before, _generator_states(devices), strict=True))


def _generator_states(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _runs_in_float32(model: Any, batch: PackedBatch) -> bool:
    """Whether a 16-bit model's own forward runs in _InFloat32: no quantized layers, foreign kernels, lack of memory."""
    if not all(parameter.dtype in PARITY_TOLERANCE for parameter in model.parameters()):
        return False
    ids, attended, _ = batch.padded()
    try:
        with _in_float32():
            return model(input_ids=ids, attention_mask=attended, use_cache=False).logits.dtype is torch.float32
    except (RuntimeError, TypeError):
        return False


@contextmanager
def _in_float32() -> Iterator[None]:
    """Inside, _InFloat32; attention by sdpa, as torch.compile cannot trace FlexAttention under such a mode."""
    with segmentwise(), _InFloat32():
        yield


class _InFloat32(TorchFunctionMode):
    """torch's functions compute in float32 what they would in 16 bits: their inputs are cast, one call at a time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call func with float32 copies of its 16-bit inputs; what writes into an input gets that input itself."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        writes = name == "__setitem__" or "out" in kwargs or (name.endswith("_") and not name.endswith("__"))
        if not writes and name != "__get__":  # a property
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _SIXTEEN_BIT:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in _SIXTEEN_BIT else value
