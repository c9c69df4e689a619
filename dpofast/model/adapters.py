"""PEFT adapters: kinds that cannot run packed, what is trained outside of one, and what wrapping does to the model.

disable_adapter() is "the model before training" only where the adapter alone is trained and where adding it left the
base weights as they were. PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA rewrite them, so log-probs of a few random ids are
compared before and after.
"""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpofast.common.eval_mode import eval_mode
from dpofast.model.parallel.adapters import whole_layers
from dpofast.model.parallel.zero import gathered_forwards
from dpofast.model.parts import text_token_ids
from dpofast.model.wrappers import input_device
from dpofast.reference import padded_logprobs, padded_rows

_PROBE_LENGTHS = ((5, 7), (9, 3), (1, 11))  # prompt and response tokens
# The same operations on the same weights: rounding of one of them, in units of the dtype's epsilon.
_SAME_WEIGHTS_EPS = 64
# Base and adapter add up to the former weights, but for the rounding of a decomposition; nats.
_SAME_FUNCTION = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class Wrapped(NamedTuple):
    """A model with a new adapter, and which of its two faces gives the log-probs that it had without one.

    base: the model without its adapter; whole: the model with it, as it is now.
    """

    model: Any
    base: bool
    whole: bool


def check_adapter(model: Any, peft_config: Any = None) -> None:
    """Refuse adapters whose forward is not that of the base model's modules, and one on top of another.

    Raises:
        ValueError: prompt learning, which changes the model's inputs; a peft_config for a model that has an adapter; an
            adapter that is merged into its base weights, and so would get no gradient; one of transformers' own
            integration, beside which all weights would train and not be saved.
    """
    check_inputs_kept(model, peft_config)
    if is_peft(model) and (merged := _merged_adapters(model)):
        raise ValueError(
            f"model: adapter {', '.join(merged)} is merged into the base weights (merge_adapter()), so its own weights "
            "would get no gradient: call model.unmerge_adapter() first"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model: this {type(model).__name__} was loaded from an adapter's folder by transformers, so all its "
            "weights would train and the adapter alone be saved: load the adapter by "
            "peft.PeftModel.from_pretrained(base_model, folder, is_trainable=True) to train it on, or merge it into "
            "its base model first (peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload())"
        )
    if peft_config is not None and is_peft(model):
        raise ValueError(
            "peft_config: the model is a PeftModel already: leave peft_config out to train its adapter on, or merge "
            "that one into the model first (model.merge_and_unload()) to train a new adapter"
        )


def _merged_adapters(model: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return sorted({str(name) for layer in layers for name in getattr(layer, "merged_adapters", ())})


def check_trainable(model: Any) -> None:
    """Refuse a model of which nothing would be trained, and warn of what an adapter's folder will not hold.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        if is_peft(model) and (outside := trained_outside(model)):
            from peft import get_peft_model_state_dict

            saved = get_peft_model_state_dict(model)
            if unsaved := [name for name in outside if name not in saved]:
                warnings.warn(
                    f"{few(unsaved)} would train, but are not part of the adapter, and its folder will not hold them: "
                    "name them in its modules_to_save, or save the merged model yourself (merge_and_unload())",
                    stacklevel=3,
                )
        return
    ways = (
        "load the adapter by peft.PeftModel.from_pretrained(base_model, folder, is_trainable=True)"
        if is_peft(model)
        else "model.requires_grad_(True) trains all weights (merge_and_unload() leaves them frozen), and a peft_config "
        "an adapter on them"
    )
    raise ValueError(f"model: expected something to train, and no parameter requires a gradient: {ways}")


def check_inputs_kept(model: Any, peft_config: Any = None) -> None:
    """Refuse prompt learning, on the model or by a config for it.

    Raises:
        ValueError: an adapter that changes the model's inputs.
    """
    configs = getattr(model, "peft_config", None)
    for config in [*(configs.values() if isinstance(configs, dict) else ()), peft_config]:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"peft_config: expected an adapter of the model's layers (LoRA and its like), got "
                f"{type(config).__name__}: prompt-learning methods put tokens of their own in front of every row, and "
                "packed rows have no place for them"
            )


def is_peft(model: Any) -> bool:
    """Whether the model is wrapped by PEFT."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def with_new_adapter(model: Any, peft_config: Any) -> Wrapped:
    """Wrap a model that check_adapter accepts by peft.get_peft_model, and compare its log-probs with those before."""
    from peft import get_peft_model

    before = probe_logps(model)
    with whole_layers(model):
        model = get_peft_model(model, peft_config)
    with model.disable_adapter():
        base = same_weights(probe_logps(model), before)
    return Wrapped(model, base, same_function(probe_logps(model), before, model.dtype))


def same_weights(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two probes come from the same operations on the same weights."""
    scale = torch.finfo(theirs.dtype).eps * _SAME_WEIGHTS_EPS * (1 + float(theirs.abs().max()))
    return bool((ours - theirs).abs().max() <= scale)


def same_function(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two probes of a model in dtype differ by rounding only, where weights were taken apart and added up."""
    return bool((ours - theirs).abs().max() <= _SAME_FUNCTION.get(dtype, _SAME_FUNCTION[torch.bfloat16]))


@torch.no_grad()
def probe_logps(model: Any) -> Tensor:
    """(21,) log-probs of a few random responses, nats, from the model's own padded logits in eval mode."""
    generator = torch.Generator().manual_seed(0)
    text = text_token_ids(model)
    draws = torch.randint(0, len(text), (sum(map(sum, _PROBE_LENGTHS)),), generator=generator)
    ids = iter(text[draws].tolist())
    rows = [(list(islice(ids, prompt)), list(islice(ids, response))) for prompt, response in _PROBE_LENGTHS]
    device = input_device(model)
    padded = {name: tensor.to(device) for name, tensor in padded_rows(rows).items()}
    with eval_mode(model), gathered_forwards(model):
        return padded_logprobs(model, **padded, use_cache=False).float()


def few(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def trained_outside(model: Any) -> list[str]:
    """Names of trainable parameters that none of the model's adapters owns: biases, norms, layers unfrozen by hand."""
    adapters = set(model.peft_config)
    return [name for name, p in model.named_parameters() if p.requires_grad and not adapters & set(name.split("."))]
