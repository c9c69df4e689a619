"""Load causal language models and adapters whole: safetensors only, and never with weights that no file had.

transformers and PEFT leave a tensor that they do not find at its random start value and only log it: a folder that
lacks tensors, a text class opened on a composite checkpoint or an adapter of another model would train and be scored.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

ADAPTER_FILE = "adapter_config.json"
_SHOWN = 5
_LAYERS = re.compile("(num|num_hidden|n|encoder|decoder)_layers?")
_MOST_LAYERS = 10_000  # a config alone makes transformers build as many as it names, before any file of weights is read


def load_causal_lm(name: str, **options: Any) -> Any:
    """Returns a causal language model, or a composite model that has one, from a folder or hub name.

    Args:
        name: as from_pretrained takes it; an adapter's folder loads its base model with the adapter on it.
        options: from_pretrained's.

    Raises:
        ValueError: its architecture is none, its weights are no safetensors, cannot be read, lack tensors or have some
            of other shapes or of further layers, which the message names.
    """
    try:
        kind = _auto_class(name, options)
        # its own error for other shapes names none of them
        told = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = kind.from_pretrained(name, **{**options, **told})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name}: its weights cannot be loaded from safetensors: {error}") from error
    _refuse_gaps(name, "its weights lack", found["missing_keys"])
    shapes = [f"{key} {tuple(file)} for {tuple(expected)}" for key, file, expected in found["mismatched_keys"]]
    _refuse_gaps(name, "its weights have other shapes than its config:", shapes)
    # A value head or a layer for speculative decoding is no part of the model; a layer like its own ones is.
    own = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    further = [key for key in found["unexpected_keys"] if re.sub(r"\d+", "#", key) in own]
    _refuse_gaps(name, "its config has no place for", further)
    return model


def config_of(name: str, **options: Any) -> Any:
    """Returns the config of a model, or of the base model of an adapter.

    Args:
        name: a folder or hub name.
        options: from_pretrained's, of which those are used that say where and how it is read.

    Raises:
        ValueError: more than 10,000 layers.
        OSError: there is no config.json.
    """
    from transformers import AutoConfig

    if (adapter := Path(name) / ADAPTER_FILE).is_file():
        name = json.loads(adapter.read_bytes())["base_model_name_or_path"]
    access = {key: options[key] for key in ("trust_remote_code", "revision", "token", "cache_dir") if key in options}
    check_depth(name, **access)
    return AutoConfig.from_pretrained(name, **access)


def check_depth(name: str, **access: Any) -> None:
    """Check the number of layers in a model's config.json, before anything is built of it.

    Args:
        name: a folder or hub name.
        access: from_pretrained's options of where and how it is read.

    Raises:
        ValueError: more than 10,000.
        OSError: there is no config.json.
    """
    from transformers import PreTrainedConfig

    settings, _ = PreTrainedConfig.get_config_dict(name, **access)
    for key, layers in _depths(settings):
        if layers > _MOST_LAYERS:
            raise ValueError(
                f"{name}: its config has {key}={layers:,}, and models of at most {_MOST_LAYERS:,} layers are loaded: "
                "correct its config.json"
            )


def load_adapter(base: Any, folder: str, **options: Any) -> Any:
    """Returns the base model with the PEFT adapter of a folder on it.

    Raises:
        ValueError: the adapter's file lacks tensors of it, or has others than the base model takes.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder, **options)
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"{folder}: its weights do not fit the adapter's config: {warning.message}")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    # again, for what it returns: tensors that the model has no place for
    result: Any = set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    _refuse_gaps(folder, "the base model has no place for", result.unexpected_keys)
    return model


def _auto_class(name: str, options: dict[str, Any]) -> Any:
    """The auto class that opens a checkpoint as what it is: a text class on a composite one finds other names."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    if (Path(name) / ADAPTER_FILE).is_file():
        return AutoModelForCausalLM
    config = config_of(name, **options)
    if config.get_text_config() is not config:
        for kind in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            if type(config) in kind._model_mapping:
                return kind
    elif not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ["ForCausalLM"]):
        raise ValueError(
            f"{name}: its architecture is {config.architectures}, and a decoder-only causal language model is needed"
        )
    return AutoModelForCausalLM


def _depths(settings: dict[str, Any], part: str = "") -> Iterator[tuple[str, int]]:
    """The numbers of layers in a config and in those nested in it, with their names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _depths(value, f"{part}{key}.")
        elif isinstance(value, int) and _LAYERS.fullmatch(key):
            yield f"{part}{key}", value


def _refuse_gaps(name: str, what: str, keys: Any) -> None:
    if keys := sorted(keys):
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise ValueError(
            f"{name}: {what} {', '.join(keys[:_SHOWN])}{more}: fetch or save it anew, whole and as the class that its "
            "config names"
        )
