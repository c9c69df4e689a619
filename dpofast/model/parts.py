"""The parts of a model that preference pairs of text run through: its causal language model, backbone and text config.

A composite model (Gemma 3, Qwen-VL, LLaVA: a language model beside encoders of images or sound) is attached like a text
model: its language model runs alone, with the composite's own head. Without images that is what its own forward
computes, which the parity check of attach_logprob_head compares.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

# Their language model attends to the whole prompt at once, which a causal forward does not.
_PREFIX_ATTENTION = ("paligemma", "colpali")
_MEDIA = re.compile(r"(image|video|audio)_token_(id|index)$")


def base_causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_composite(model: Any) -> bool:
    """Whether a transformers model contains other parts than its language model."""
    return model.config.get_text_config() is not model.config


def backbone_of(model: Any) -> Any:
    """What token ids alone run through below the LM head: the language model of a composite, else the whole of it.

    Raises:
        ValueError: there is none.
    """
    return _language_model(model) if is_composite(model) else whole_backbone(model)


def whole_backbone(model: Any) -> Any:
    """The model without its LM head: its base_model. Llama 4's names one that it lacks, and its `model` is taken.

    Raises:
        ValueError: there is none.
    """
    backbone = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if backbone is None:
        raise ValueError(f"{type(model).__name__}: expected a model whose backbone is its base_model, and it has none")
    return backbone


def beside_text(model: Any) -> list[torch.nn.Parameter]:
    """Weights that text alone never reaches: those of a composite's encoders and their projectors."""
    base = base_causal_lm(model)
    if not is_composite(base):
        return []
    reached = {id(p) for part in (backbone_of(base), base.get_output_embeddings()) for p in part.parameters()}
    return [parameter for parameter in base.parameters() if id(parameter) not in reached]


def named_layers(model: Any) -> set[str]:
    """The class names of a model's decoder layers, as transformers names them: what is sharded as one unit."""
    return set(getattr(base_causal_lm(model), "_no_split_modules", None) or ())


def media_token_ids(model: Any) -> set[int]:
    """The token ids that stand for images, videos and sound in a composite model's input; no other model has any."""
    named = vars(model.config).items() if is_composite(model) else ()
    return {value for name, value in named if _MEDIA.match(name) and isinstance(value, int)}


def text_token_ids(model: Any) -> Tensor:
    """(n,) int64, ascending: the vocabulary without media_token_ids, from which random text is drawn for a check."""
    return torch.tensor(sorted(set(range(model.config.get_text_config().vocab_size)) - media_token_ids(model)))


def _language_model(model: Any) -> Any:
    name = type(model).__name__
    if getattr(model.config, "model_type", None) in _PREFIX_ATTENTION:
        raise ValueError(
            f"{name}: it attends to the whole of its prompt, not causally: a causal forward is not its own"
        )
    decoder = model.get_decoder()
    if decoder in (model, model.base_model) or decoder is None:
        raise ValueError(
            f"{name}: expected a composite model with a language model of its own (get_decoder()), got none"
        )
    # BLIP-2's is a causal language model, with the head inside
    return backbone_of(decoder) if decoder.get_output_embeddings() is not None else decoder
