"""Attaches the log-prob head to a causal language model of transformers: model(packed=batch) -> LogprobOutput.

The trunk runs once over a packed row, only the rows that predict a target reach the head, and the logits are never
built. Every other call of the model (plain logits, generation, saving) is unchanged.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.attention import PackedLayout, restore_attention, use_packed_attention
from dpofast.linear_preference import linear_preference_loss
from dpofast.logprobs import LogprobOutput, linear_logprobs
from dpofast.packing import PackedBatch, pack
from dpofast.preference import PreferenceLoss, PreferenceOutput, segment_sums
from dpofast.reference import padded_logprobs

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_CANARY_PROMPT, _CANARY_RESPONSES = 5, (4, 6)
# Largest |packed − padded| log-prob of the canary; a wrong mask or a missing logit scale is off by 0.1 and more.
_CANARY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


@dataclass(frozen=True)
class PackedPreference:
    """What turns model(packed=batch, preference=...) into the whole loss, in one pass over the head.

    ref_logps (S,) float32 on the batch's device; num_pairs is what the sum over the batch's pairs is divided by.
    """

    ref_logps: Tensor
    loss: PreferenceLoss
    num_pairs: int


def attach_logprob_head(model: Any) -> Any:
    """Make model(packed=PackedBatch, stats=()) return a LogprobOutput over the batch's N targets. Returns the model.

    model(packed=batch, preference=PackedPreference(...)) returns the PreferenceOutput of the batch's pairs instead.

    Args:
        model: a decoder-only transformers model with a language-modelling head. A PEFT model is attached through its
            base model and is called itself.

    Raises:
        ValueError: a model that cannot run packed, by name and with the reason: no AttentionInterface, an encoder, a
            stateful or hybrid trunk, an adapter on the head, or packed numbers that differ from padded ones.
    """
    base = _base_causal_lm(model)
    if isinstance(base, _PackedForward):
        return model
    _admit(base)
    plain_class: Any = type(base)
    base.__class__ = _packed_class(plain_class)
    use_packed_attention(base)
    try:
        _canary(base)
    except ValueError:
        detach_logprob_head(model)
        raise
    return model


def detach_logprob_head(model: Any) -> Any:
    """Undo attach_logprob_head. Returns the model."""
    base = _base_causal_lm(model)
    if isinstance(base, _PackedForward):
        base.__class__ = type(base)._unpacked_class
        restore_attention(base)
    return model


def sequence_logprobs(output: LogprobOutput, batch: PackedBatch) -> Tensor:
    """Sums of the batch's target log-probs over each of its S sequences: (S,) float32, nats, differentiable."""
    return segment_sums(output.logps, batch.cu_targets)


class _PackedForward:
    """Marks a model class whose forward understands packed batches."""

    _unpacked_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy must be told how to get it again.
        return _rebuilt, (self._unpacked_class,), self.__dict__


def _rebuilt(cls: type) -> Any:
    packed: Any = _packed_class(cls)
    return packed.__new__(packed)


@functools.cache
def _packed_class(cls: Any) -> type:
    """A subclass of the model's class, of the same name: forward is looked up through the type, so deepcopy works."""

    @functools.wraps(cls.forward)  # generate() reads the parameters of forward
    def forward(
        self: Any,
        *args: Any,
        packed: PackedBatch | None = None,
        stats: tuple[str, ...] = (),
        preference: PackedPreference | None = None,
        max_logits_bytes: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if packed is None:
            return cls.forward(self, *args, **kwargs)
        extra = [name for name, value in kwargs.items() if value is not None]
        if args or extra:
            raise ValueError(f"model(packed=...): expected no further model inputs, got {extra or 'positional ones'}")
        return _packed_output(self, packed, stats, preference, max_logits_bytes)

    members = {
        "forward": forward,
        "_unpacked_class": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (_PackedForward, cls), members)


def _packed_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """The trunk's output (N, D) at the rows that predict a target."""
    layout = PackedLayout(batch.segments)
    output = model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        # transformers returns a four-dimensional mask as it is; without one it would build a (T, T) mask
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
        use_cache=False,
        packed_layout=layout,
    )
    layers = model.config.get_text_config().num_hidden_layers
    if layout.calls < layers:
        raise ValueError(
            f"{type(model).__name__}: {layout.calls} of {layers} attention layers saw the packed layout, so the packed "
            "numbers would be wrong; this model cannot run packed"
        )
    return output.last_hidden_state[0].index_select(0, batch.logit_rows)


def _packed_output(
    model: Any,
    batch: PackedBatch,
    stats: tuple[str, ...],
    preference: PackedPreference | None,
    max_logits_bytes: int | None,
) -> LogprobOutput | PreferenceOutput:
    if stats and preference is not None:
        raise ValueError(f"stats: expected none beside preference=..., which has no per-token outputs, got {stats}")
    head = model.get_output_embeddings()
    hidden = _packed_hidden(model, batch)
    options = {
        "bias": head.bias,
        "max_logits_bytes": max_logits_bytes,
        **_logit_options(model.config.get_text_config()),
    }
    if preference is None:
        return linear_logprobs(hidden, head.weight, batch.targets, stats=stats, **options)
    return linear_preference_loss(
        hidden,
        head.weight,
        batch.targets,
        batch.cu_targets,
        batch.pairs,
        preference.ref_logps,
        loss=preference.loss,
        num_pairs=preference.num_pairs,
        **options,
    )


def _logit_options(config: Any) -> dict[str, Any]:
    """What a family does to its logits, read from its config."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return {"logit_scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}  # Gemma


def _base_causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _admit(model: Any) -> None:
    """Refuse what would compute wrong numbers without an exception."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{name}: expected a transformers causal language model")
    text_config = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
        raise ValueError(
            f"{name}: expected a decoder-only causal language model (AutoModelForCausalLM), not an encoder"
        )
    if text_config is not config:
        raise ValueError(f"{name}: expected a text-only model; load its language model alone")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"{name}: expected a plain nn.Linear head, got {type(head).__name__}: leave the head out of the adapter's "
            "target_modules and unquantized"
        )
    if not getattr(model, "_supports_attention_backend", False) or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name}: its attention does not go through transformers' AttentionInterface: it cannot run packed"
        )
    foreign = set(getattr(config, "layer_types", None) or _LAYER_TYPES) - _LAYER_TYPES
    if foreign:
        raise ValueError(f"{name}: it has {sorted(foreign)} layers, and only attention layers can run packed")


@torch.no_grad()
def _canary(model: Any) -> None:
    """Packed against padded on random ids: the one test that a model with an unknown twist cannot pass."""
    generator = torch.Generator().manual_seed(0)
    lengths = (_CANARY_PROMPT, *_CANARY_RESPONSES)
    prompt, chosen, rejected = (
        torch.randint(0, model.config.vocab_size, (length,), generator=generator).numpy() for length in lengths
    )
    # Responses that differ in their first token are distinct branches, whatever the draw.
    rejected[0] = (chosen[0] + 1) % model.config.vocab_size
    (batch,) = pack([{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}])
    device = model.get_output_embeddings().weight.device
    training = model.training
    model.eval()
    try:
        packed = model(packed=batch.to(device)).logps
        padded = padded_logprobs(model, *(tensor.to(device) for tensor in batch.padded()), use_cache=False)
    finally:
        model.train(training)
    difference = float((packed - padded).abs().max())
    if not difference <= _CANARY_TOLERANCE[model.dtype]:
        raise ValueError(
            f"{type(model).__name__}: packed and padded log-probs of the same tokens differ by {difference:.2g} nats, "
            f"more than {_CANARY_TOLERANCE[model.dtype]}: this model cannot run packed"
        )
