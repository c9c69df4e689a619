"""Attaches the log-prob head to a causal language model of transformers: model(packed=batch) -> LogprobOutput.

The trunk runs once over a packed row, only the rows that predict a target reach the head, and the logits are never
built. A model whose layers cannot attend inside a packed row runs over padded rows instead, behind the same interface.
Every other call of the model (plain logits, generation, saving) is unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from dpofast.head.linear_logprobs import linear_logprobs
from dpofast.head.linear_preference import linear_preference_loss
from dpofast.head.options import LogprobOutput
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import PreferenceOutput
from dpofast.losses.sequences import segment_sums
from dpofast.model.attention.interface import restore_attention, use_packed_attention
from dpofast.model.forward import packed_hidden, padded_hidden, trunk_of
from dpofast.model.support import admit_head, admit_packed, check_numbers
from dpofast.packing.pack import PackedBatch

# FSDP2 looks for a forward's output tensors in pytrees, and gathers weights for backward by hooks on them.
for _output in (LogprobOutput, PreferenceOutput):
    register_dataclass(_output)


@dataclass(frozen=True)
class PackedPreference:
    """What turns model(packed=batch, preference=...) into the whole loss, in one pass over the head.

    ref_logps (S,) float32 on the batch's device, (P, 2) with ld_alpha, or None; num_pairs is what the sum over the
    batch's pairs is divided by. The others are as in preference_loss.
    """

    ref_logps: Tensor | None
    loss: PreferenceLoss
    num_pairs: int
    num_chosen_tokens: int | None = None
    earlier_rewards: Tensor | None = None


def attach_logprob_head(model: Any, *, padded: bool = False) -> Any:
    """Make model(packed=PackedBatch, stats=()) return a LogprobOutput over the batch's N targets. Returns the model.

    model(packed=batch, preference=PackedPreference(...)) returns the PreferenceOutput of the batch's pairs instead.
    With balance=True either holds a mixture of experts' load-balancing loss as aux_loss.

    Args:
        model: a decoder-only transformers model with a language-modelling head. A PEFT model is attached through its
            base model and is called itself.
        padded: run the trunk over the batch's sequences as padded rows, by the model's own attention: any decoder can,
            and every sequence computes its prompt again. Equal numbers, more work.

    Raises:
        ValueError: a model that cannot run so, by name and with the reason: an encoder, an adapter on the head, numbers
            that differ from the model's own; and for packed rows no AttentionInterface, a stateful or a hybrid trunk.
    """
    base = base_causal_lm(model)
    if isinstance(base, _PackedForward):
        if base._padded_rows != padded:
            raise ValueError(
                f"padded: expected {base._padded_rows}, as the head is attached already, got {padded}: detach it first"
            )
        return model
    admit_head(base)
    if not padded:
        admit_packed(base)
    plain_class: Any = type(base)
    base.__class__ = packed_class(plain_class, padded)
    if not padded:
        use_packed_attention(base)
    try:
        check_numbers(base, padded)
    except Exception:
        detach_logprob_head(model)
        raise
    return model


def detach_logprob_head(model: Any) -> Any:
    """Undo attach_logprob_head. Returns the model."""
    base = base_causal_lm(model)
    if isinstance(base, _PackedForward):
        padded = base._padded_rows
        base.__class__ = type(base)._unpacked_class
        if not padded:
            restore_attention(base)
    return model


def sequence_logprobs(output: LogprobOutput, batch: PackedBatch) -> Tensor:
    """Sums of the batch's target log-probs over each of its S sequences: (S,) float32, nats, differentiable.

    Raises:
        ValueError: an output that is not of this batch.
    """
    if len(output.logps) != batch.num_targets:
        raise ValueError(f"output: expected {batch.num_targets} log-probs, one a target, got {len(output.logps)}")
    return segment_sums(output.logps, batch.cu_targets)


class _PackedForward:
    """Marks a model class whose forward understands packed batches."""

    _unpacked_class: type
    _padded_rows: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy must be told how to get it again.
        return _rebuilt, (self._unpacked_class, self._padded_rows), self.__dict__


def _rebuilt(cls: type, padded: bool) -> Any:
    packed: Any = packed_class(cls, padded)
    return packed.__new__(packed)


@functools.cache
def packed_class(cls: Any, padded: bool) -> type:
    """A subclass of the model's class, of the same name: forward is looked up through the type, so deepcopy works."""

    @functools.wraps(cls.forward)  # generate() reads the parameters of forward
    def forward(
        self: Any,
        *args: Any,
        packed: PackedBatch | None = None,
        stats: tuple[str, ...] = (),
        preference: PackedPreference | None = None,
        balance: bool = False,
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
        return _packed_output(self, packed, stats, preference, balance, max_logits_bytes)

    members = {
        "forward": forward,
        "_unpacked_class": cls,
        "_padded_rows": padded,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (_PackedForward, cls), members)


def _packed_output(
    model: Any,
    batch: PackedBatch,
    stats: tuple[str, ...],
    preference: PackedPreference | None,
    balance: bool,
    max_logits_bytes: int | None,
) -> LogprobOutput | PreferenceOutput:
    if stats and preference is not None:
        raise ValueError(f"stats: expected none beside preference=..., which has no per-token outputs, got {stats}")
    # On a GPU looking would be a sync; there the embedding's own assert stops.
    if batch.input_ids.is_cpu and not torch.compiler.is_compiling():
        # its number and not its weight's, of which ZeRO-3 leaves nothing here
        words = trunk_of(model).get_input_embeddings()
        largest, vocab = int(batch.input_ids.max()), getattr(words, "num_embeddings", None)
        if vocab is not None and largest >= vocab:
            raise ValueError(f"packed: expected token ids below the model's vocabulary of {vocab}, got {largest}")
    head = model.get_output_embeddings()
    if model._padded_rows and balance:
        raise ValueError("balance: expected packed rows for a load-balancing loss, and the model runs over padded ones")
    if model._padded_rows:
        hidden, aux_loss = padded_hidden(model, batch), None
    else:
        hidden, aux_loss = packed_hidden(model, batch, balance=balance)
    options = {"max_logits_bytes": max_logits_bytes, **logit_options(model.config.get_text_config())}

    def output(hidden: Tensor) -> LogprobOutput | PreferenceOutput:
        weighted = {"bias": head.bias, **options}
        if preference is None:
            return linear_logprobs(hidden, head.weight, batch.targets, stats=stats, **weighted)
        return linear_preference_loss(
            hidden,
            head.weight,
            batch.targets,
            batch.cu_targets,
            batch.pairs,
            preference.ref_logps,
            loss=preference.loss,
            num_pairs=preference.num_pairs,
            num_chosen_tokens=preference.num_chosen_tokens,
            earlier_rewards=preference.earlier_rewards,
            **weighted,
        )

    return replace(_as_forward(head, output, hidden), aux_loss=aux_loss)


@torch.compiler.disable  # Dynamo cannot follow a forward that is put in place for one call
def _as_forward(module: Any, compute: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """compute(hidden) as the module's forward: a sharded weight is whole only between the hooks around it.

    They look for the output's tensors in tuples, so a dataclass comes out of the module as one.
    """
    kinds = []

    def forward(hidden: Tensor) -> tuple[Any, ...]:
        output = compute(hidden)
        kinds.append(type(output))
        return tuple(getattr(output, field.name) for field in fields(output))

    former = module.__dict__.get("forward")
    module.forward = forward
    try:
        values = module(hidden)
        return kinds[0](*values)
    finally:
        del module.forward
        if former is not None:
            module.forward = former


def logit_options(config: Any) -> dict[str, Any]:
    """What a family does to its logits, read from its config."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1, Muse Glimmer
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # HyperCLOVA X multiplies by it; Granite and MiniCPM3 divide
    scale *= scaling if getattr(config, "model_type", None) == "hyperclovax" else 1 / scaling
    return {"logit_scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}  # Gemma


def base_causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
