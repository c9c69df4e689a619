"""Checks whether a model can run packed or padded with the log-prob head, and refuses one that would be computed wrong.

Many models run under a packed layout without an exception but give wrong log-probs: their attention ignores the layout
(Bloom, MPT, GPT-J), or that of some layers does (hybrids), or a recurrent state crosses segments (Mamba). Rules on the
model's class and config refuse the known ones; a parity check of log-probs on a few random ids refuses the others.
"""

from __future__ import annotations

from typing import Any

import torch

from dpofast.model.lm_head import plain_heads, refused_head
from dpofast.packing.pack import pack
from dpofast.reference import padded_logprobs

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PARITY_PROMPT, _PARITY_RESPONSES = 5, (4, 6)
# Largest |packed − padded| log-prob in the parity check, nats; a wrong mask or a missing logit scale is off by 0.1.
PARITY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


def check_lm_head(model: Any) -> None:
    """Refuse a model whose logits are not one plain linear map of its backbone's output.

    Raises:
        ValueError: no decoder of text, or a head that is no nn.Linear.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{name}: expected a transformers causal language model")
    if getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
        raise ValueError(
            f"{name}: expected a decoder-only causal language model (AutoModelForCausalLM), not an encoder"
        )
    if config.get_text_config() is not config:
        raise ValueError(f"{name}: expected a text-only model; load its language model alone")
    head = model.get_output_embeddings()
    if plain_heads(head) is None:
        raise refused_head(model)
    if "forward" in vars(head):  # bound to nn.Linear's forward, so that LogprobLinear's would never run
        raise ValueError(
            f"{name}: expected a head whose forward is its class's, got one with a forward set on the module, as "
            "accelerate's hooks for several devices do: load the model on one device"
        )


def check_packed(model: Any) -> None:
    """Refuse a model whose layers do not all attend through transformers' AttentionInterface.

    Raises:
        ValueError: as cannot_pack, with the reason.
    """
    if getattr(model, "_is_stateful", False):
        raise cannot_pack(model, "it carries a state from token to token, across the branches of a packed row")
    foreign = set(getattr(model.config, "layer_types", None) or _LAYER_TYPES) - _LAYER_TYPES
    if foreign:
        known = " and ".join(sorted(_LAYER_TYPES))
        raise cannot_pack(model, f"it has {', '.join(sorted(foreign))} layers, and only {known} layers can")
    if not getattr(model, "_supports_attention_backend", False):
        raise cannot_pack(model, "its attention does not go through transformers' AttentionInterface")


def cannot_pack(model: Any, reason: object) -> ValueError:
    """The exception for a model that cannot run packed: its name, the reason, and what to do instead."""
    return ValueError(
        f"{type(model).__name__} cannot run packed: {reason}. Padded rows do without: "
        "attach_logprob_head(model, padded=True), DPOConfig(padded=True), or --padded true"
    )


@torch.no_grad()
def check_parity(model: Any, padded: bool) -> None:
    """Compare model(packed=...) with log-probs from the model's own padded logits, on a few random ids.

    It detects what the rules above do not cover: an attention that ignores the layout, or unknown scaling of logits.

    Raises:
        ValueError: log-probs that are not finite or that differ by more than PARITY_TOLERANCE.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = (_PARITY_PROMPT, *_PARITY_RESPONSES)
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
        ours = model(packed=batch.to(device)).logps
        truth = padded_logprobs(model, *(tensor.to(device) for tensor in batch.padded()), use_cache=False)
    finally:
        model.train(training)
    if not bool(truth.isfinite().all()):
        raise ValueError(
            f"{type(model).__name__}: its own log-probs are not finite on a few random ids: look for NaN and inf in "
            "its weights"
        )
    difference = float((ours - truth).abs().max())
    if difference <= PARITY_TOLERANCE[model.dtype]:
        return
    apart = f"differ by {difference:.2g} nats, more than {PARITY_TOLERANCE[model.dtype]}"
    if not padded:
        raise cannot_pack(model, f"packed and padded log-probs of the same tokens {apart}")
    raise ValueError(
        f"{type(model).__name__}: log-probs from its backbone and its head {apart}, from those of its own logits: its "
        "forward does more to the logits than dpofast knows of"
    )
