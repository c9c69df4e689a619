"""Attaches the log-prob head to a causal language model of transformers: model(packed=batch) -> LogprobOutput.

The backbone runs once over a packed row, only the hidden states that predict a target reach the LM head, and the logits
are never materialized. A model whose layers cannot attend inside a packed row runs over padded rows instead, behind the
same interface. Every other call of the model (plain logits, generation, saving) is unchanged.

Attaching exchanges two classes: the model's, for one whose forward knows `packed`, and the head's, for LogprobLinear.
Weights, their names and the rest of the model stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from dpofast.head.linear_logprobs import linear_logprobs
from dpofast.head.linear_preference import linear_preference_loss
from dpofast.head.options import LogprobOutput
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import PreferenceOutput, token_preference_loss
from dpofast.losses.sequences import segment_sums
from dpofast.model.adapters import check_inputs_kept
from dpofast.model.attention.interface import register_again, restore_attention, use_packed_attention
from dpofast.model.checks.images import check_images
from dpofast.model.checks.parity import check_parity, forget_parity
from dpofast.model.checks.support import CannotPack, check_lm_head, check_packed
from dpofast.model.dropout import check_rates
from dpofast.model.forward import packed_hidden, packed_routing, padded_hidden
from dpofast.model.lm_head import logit_options, logprob_head, restore_head
from dpofast.model.moe import RoutingCounts
from dpofast.model.parallel.logprobs import of_all_targets
from dpofast.model.parallel.refusals import check_split_call
from dpofast.model.parallel.tensor import split_again
from dpofast.model.parts import backbone_of, base_causal_lm, is_composite, media_token_ids
from dpofast.model.recurrent.follow import follow_again, follow_segments, stop_following_segments
from dpofast.model.rope import follow_lengths, stop_following
from dpofast.model.wrappers import exchange_class, take_off_autocast
from dpofast.packing.batch import PackedBatch

# FSDP2 looks for the tensors of a module's output in pytrees, and hooks on them gather the weights for the backward.
for _output in (LogprobOutput, PreferenceOutput):
    register_dataclass(_output)


@dataclass(frozen=True)
class PackedPreference:
    """The preference loss that model(packed=batch, preference=...) computes, in one pass over the LM head.

    Attributes:
        ref_logps: (S,) float32 on the batch's device, (P, 2) with ld_alpha, or None.
        loss: which loss, with its options.
        num_pairs: what the sum over the batch's pairs is divided by.
        num_chosen_tokens: as in preference_loss.
        earlier_rewards: as in preference_loss.
    """

    ref_logps: Tensor | None
    loss: PreferenceLoss
    num_pairs: int
    num_chosen_tokens: float | None = None
    earlier_rewards: Tensor | None = None


def attach_logprob_head(model: Any, *, padded: bool = False) -> Any:
    """Make model(packed=PackedBatch, stats=()) return a LogprobOutput over the batch's N targets. Returns the model.

    model(packed=batch, preference=PackedPreference(...)) returns the PreferenceOutput of the batch's pairs instead.
    balance=True adds a mixture-of-experts model's load-balancing loss to either, as aux_loss; with the RoutingCounts of
    several batches as balance, the batch's addend of the loss over all of them. model(packed=batch, count_routing=True)
    returns the RoutingCounts of one, from the backbone alone.

    Its log-probs are compared with the model's own on a few ids. Where another attention may run since (on another
    device, in another dtype, inside autocast), a second call compares them again; otherwise it does nothing.

    Args:
        model: a decoder-only transformers model with a language-modelling head. A PEFT model is attached through its
            base model and is called itself.
        padded: run the backbone over the batch's sequences as padded rows, by the model's own attention. Every decoder
            can, with equal numbers, but each sequence computes its prompt again.

    Raises:
        ValueError: a model that cannot run so, by name and with the reason: an encoder, an adapter on the head, numbers
            that differ from the model's own; and for packed rows no AttentionInterface, recurrent layers that cannot
            follow the branches of a packed row, or for which dpofast[hybrid] is not installed;
            a forward set on the instance by something that model/wrappers.py does not know.
    """
    check_inputs_kept(model)
    base = base_causal_lm(model)
    if isinstance(base, PackedForward):
        if base._padded_rows != padded:
            raise ValueError(
                f"padded: expected {base._padded_rows}, as the head is attached already, got {padded}: detach it first"
            )
        _take_off_autocast(model, base, stacklevel=3)
    try:
        if isinstance(base, PackedForward):
            with _detached_where_refused(model):
                check_parity(base, padded)
        else:
            _attach(model, padded)
    except CannotPack as error:
        raise ValueError(f"{error}. {_padded_advice(model)}") from error
    return model


def _attach(model: Any, padded: bool) -> None:
    base = base_causal_lm(model)
    check_lm_head(base)
    check_rates(base)
    if not padded:
        check_packed(base)
    _take_off_autocast(model, base, stacklevel=4)
    split_again(base)
    plain_class: Any = type(base)
    exchange_class(base, packed_class(plain_class, padded))
    with _detached_where_refused(model):
        # before anything wraps or shards the head: a wrapper takes the class that it meets
        logprob_head(base)
        follow_lengths(base)
        if not padded:
            use_packed_attention(backbone_of(base))
            follow_segments(base)
        check_parity(base, padded)


@contextlib.contextmanager
def _detached_where_refused(model: Any) -> Iterator[None]:
    """Detach the head if something raises inside, and say so in words where the cause is known."""
    base = base_causal_lm(model)
    try:
        yield
    except Exception as error:
        hooks = base.get_output_embeddings()._forward_hooks
        detach_logprob_head(model)
        name, reason = type(base).__name__, f"{type(error).__name__}: {error}"
        if isinstance(error, ValueError) and str(error).startswith(name):  # a refusal
            raise
        if hooks:
            names = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks.values())
            raise ValueError(
                f"{name}: a forward hook on its LM head ({names}) cannot take what the head returns here, a tuple of "
                f"log-probs and no logits: remove it ({reason})"
            ) from error
        if is_composite(base):
            raise ValueError(f"{name}: it does not run on text alone: {reason}") from error
        raise


def _take_off_autocast(model: Any, base: Any, *, stacklevel: int) -> None:
    """Take accelerate's autocast off a model, with a warning where there was one: a caller's loop has its own."""
    if any([take_off_autocast(model), take_off_autocast(base)]):  # both, which may be one
        warnings.warn(
            f"{type(base).__name__}: accelerate's autocast, which an earlier training put over its forward, is taken "
            "off: from now on the model runs in the precision of its weights and of the autocast that you enter",
            stacklevel=stacklevel,
        )


def _padded_advice(model: Any) -> str:
    """What to do with a model that cannot run packed: padded rows, where it was tried and runs so."""
    try:
        _attach(model, True)
    except ValueError as error:
        return f"Padded rows do not help: {error}"
    detach_logprob_head(model)
    return "Padded rows do without: attach_logprob_head(model, padded=True), DPOConfig(padded=True), or --padded true"


def detach_logprob_head(model: Any) -> Any:
    """Undo attach_logprob_head. Returns the model."""
    base = base_causal_lm(model)
    if isinstance(base, PackedForward):
        padded = base._padded_rows
        exchange_class(base, type(base)._unpacked_class)
        restore_head(base)
        stop_following(base)
        forget_parity(base)
        if not padded:
            restore_attention(backbone_of(base))
            stop_following_segments(base)
    return model


def sequence_logprobs(output: LogprobOutput, batch: PackedBatch) -> Tensor:
    """Sums of the batch's target log-probs over each of its S sequences: (S,) float32, nats, differentiable.

    Of weight · log-prob where the batch has token weights (batch.columns.token_weights).

    Raises:
        TypeError: no LogprobOutput.
        ValueError: an output that is not of this batch.
    """
    if not isinstance(output, LogprobOutput):
        raise TypeError(
            f"output: expected the LogprobOutput of model(packed=batch), got {type(output).__name__}: pass the output "
            "itself and not its logps"
        )
    if len(output.logps) != batch.num_targets:
        raise ValueError(f"output: expected {batch.num_targets} log-probs, one a target, got {len(output.logps)}")
    return segment_sums(output.logps, batch.cu_targets, batch.columns.token_weights)


class PackedForward:
    """Base of the classes that packed_class makes: models whose forward takes packed batches."""

    _unpacked_class: type
    _padded_rows: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so pickle and deepcopy are told how to make it again."""
        return _rebuilt, (self._unpacked_class, self._padded_rows), self.__dict__

    def __setstate__(self, state: Any) -> None:
        """Another process may not have attached a model yet, and its attention is registered by name."""
        super().__setstate__(state)  # type: ignore[misc]
        split_again(self)  # type: ignore[arg-type]
        if not self._padded_rows:
            register_again(backbone_of(self))
            follow_again(self)


def _rebuilt(cls: type, padded: bool) -> Any:
    packed: Any = packed_class(cls, padded)
    return packed.__new__(packed)


@functools.cache
def packed_class(cls: Any, padded: bool) -> type:
    """A subclass of the model's class, of the same name, whose forward takes packed batches.

    A class and not a forward set on the instance, which a deepcopy would share with its original.
    """

    def forward(
        self: Any,
        *args: Any,
        packed: PackedBatch | None = None,
        stats: tuple[str, ...] = (),
        preference: PackedPreference | None = None,
        balance: bool | RoutingCounts = False,
        count_routing: bool = False,
        max_logits_bytes: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if packed is not None and not isinstance(packed, PackedBatch):
            several = isinstance(packed, list)
            got = "a list: call it once for each batch that pack() returns" if several else repr(packed)
            raise TypeError(f"model(packed=...): expected a PackedBatch, got {got}")
        if packed is None:
            return cls.forward(self, *args, **kwargs)
        extra = [name for name, value in kwargs.items() if value is not None]
        if args or extra:
            raise ValueError(f"model(packed=...): expected no further model inputs, got {extra or 'positional ones'}")
        _check_ids(self, packed)
        if packed.split is not None:
            counts_routing = bool(balance) or count_routing
            check_split_call(self, packed, padded=self._padded_rows, counts_routing=counts_routing)
        if self._padded_rows and (balance or count_routing):
            raise ValueError(
                "balance: expected packed rows for a load-balancing loss, and the model runs over padded ones"
            )
        if not count_routing:
            return _packed_output(self, packed, stats, preference, balance, max_logits_bytes)
        if stats or preference is not None or balance:
            raise ValueError("count_routing: expected no stats, preference or balance beside it: it has no LM head")
        return packed_routing(self, packed)

    # generate() and Trainer read the parameters of forward; functools.wraps would also leave a link to the class's own
    # forward, which accelerate follows when it unwraps a model
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    members = {
        "forward": forward,
        "_unpacked_class": cls,
        "_padded_rows": padded,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (PackedForward, cls), members)


def _check_ids(model: Any, batch: PackedBatch) -> None:
    """Check that the batch's ids are text of the model's vocabulary, but for the placeholders of the batch's images.

    Raises:
        ValueError: they are not, or the model takes no images.
    """
    # Reading ids on a GPU would be a sync; there the embedding's own assert stops.
    if batch.input_ids.is_cpu and not torch.compiler.is_compiling():
        # num_embeddings and not the weight's rows, of which ZeRO-3 leaves none here
        words = model.get_input_embeddings()
        largest, vocab = int(batch.input_ids.max()), getattr(words, "num_embeddings", None)
        if vocab is not None and largest >= vocab:
            raise ValueError(f"packed: expected token ids below the model's vocabulary of {vocab}, got {largest}")
    media = media_token_ids(model)
    if batch.media is not None:
        check_images(model, batch.media)
        media -= {batch.media.token_id}  # where there is no image, pack() has refused them
    ids = torch.cat((batch.input_ids, batch.targets)) if media else batch.targets
    if media and bool(torch.isin(ids, torch.tensor(sorted(media), device=ids.device)).any()):
        raise ValueError(
            f"packed: expected text alone, got ids among {sorted(media)}, which stand for images or sound in "
            f"{type(model).__name__}: take these rows out"
        )


def _packed_output(
    model: Any,
    batch: PackedBatch,
    stats: tuple[str, ...],
    preference: PackedPreference | None,
    balance: bool | RoutingCounts,
    max_logits_bytes: int | None,
) -> LogprobOutput | PreferenceOutput:
    if stats and preference is not None:
        raise ValueError(f"stats: expected none beside preference=..., which has no per-token outputs, got {stats}")
    if model._padded_rows:
        hidden, aux_loss = padded_hidden(model, batch), None
    else:
        hidden, aux_loss = packed_hidden(model, batch, balance=balance)
    options = {"max_logits_bytes": max_logits_bytes, **logit_options(model.config.get_text_config())}
    split, own_targets = batch.split, batch.targets
    if split is not None:
        own_targets = own_targets.index_select(0, split.targets)
        if preference is not None and preference.loss.use_weighting:
            stats = ("log_sum_sq_probs",)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LogprobOutput | PreferenceOutput:
        hidden = hidden.to(weight.dtype)  # as Mamba does, whose residuals are float32
        there = functools.partial(_moved, device=weight.device)  # accelerate may place the head on a device of its own
        targets = there(own_targets)
        if preference is None or split is not None:
            return linear_logprobs(hidden, weight, targets, bias=bias, stats=stats, **options)
        return linear_preference_loss(
            hidden,
            weight,
            targets,
            batch.cu_targets,
            batch.pairs,
            there(preference.ref_logps),
            loss=preference.loss,
            num_pairs=preference.num_pairs,
            num_chosen_tokens=preference.num_chosen_tokens,
            earlier_rewards=there(preference.earlier_rewards),
            columns=batch.columns.moved(there),
            bias=bias,
            **options,
        )

    output = (_moved(value, batch.input_ids.device) for value in logprob_head(model)(hidden, compute=compute))
    if split is None:
        output_class: Any = LogprobOutput if preference is None else PreferenceOutput
        return replace(output_class(*output), aux_loss=aux_loss)
    scored = of_all_targets(LogprobOutput(*output), split)
    if preference is None:
        return scored
    return token_preference_loss(
        scored.logps,
        batch.cu_targets,
        batch.pairs,
        preference.ref_logps,
        loss=preference.loss,
        log_sum_sq_probs=scored.log_sum_sq_probs,
        num_pairs=preference.num_pairs,
        num_chosen_tokens=preference.num_chosen_tokens,
        earlier_rewards=preference.earlier_rewards,
        columns=batch.columns,
    )


def _moved(value: Any, device: torch.device) -> Any:
    return None if value is None else value.to(device)


def runs_padded(model: Any) -> bool:
    """Whether an attached model was attached with padded=True."""
    return base_causal_lm(model)._padded_rows
