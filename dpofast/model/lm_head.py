"""The LM head of an attached model: LogprobLinear, and what a model family does to its logits.

A fused head reads the weight itself. FSDP2 and DeepSpeed's ZeRO-3 gather a sharded weight in hooks around the layer's
call and free it afterwards, so the fused computation has to run inside that call: the head's class is exchanged once,
when the model is attached, and head(hidden, compute=...) runs it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor, nn

from dpofast.model.parallel.tensor import ComputesBeside
from dpofast.model.wrappers import exchange_class

# Names in configs, and the families that read them
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse Glimmer
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM

KNOWN_LOGIT_ENTRIES = frozenset((*_MULTIPLIERS, *_DIVISORS, *_SOFTCAPS))


class LogprobLinear(nn.Linear):
    """nn.Linear whose call can compute something else than logits from its weight and bias.

    Parameters, their names, tied weights and hooks are those of the nn.Linear that it was; without `compute` so is the
    forward. A class of the module, not an attribute of the instance: copies and pickles use their own weights.
    """

    split_style = ComputesBeside

    def forward(self, input: Tensor, compute: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None) -> Any:
        """Logits (..., V) of input (..., D), or the fields of the dataclass compute(input, weight, bias).

        The fields come as a tuple: hooks that prepare the backward look for tensors there and not in a dataclass.
        """
        if compute is None:
            return super().forward(input)
        output = compute(input, self.weight, self.bias)
        return tuple(getattr(output, field.name) for field in fields(output))


def logprob_head(model: Any) -> Callable[..., Any]:
    """What head(hidden, compute=...) is called on: the model's head, whose nn.Linear becomes a LogprobLinear.

    Asked for before each call, because a head may be exchanged after the model was attached: resize_token_embeddings
    makes a new nn.Linear. Of PEFT's wrappers, modules_to_save passes calls on to the copy that is active, and
    trainable_token_indices puts trained rows into the weight, which is then computed here.

    Raises:
        ValueError: a head that is neither, such as one with an adapter.
    """
    head = model.get_output_embeddings()
    linears = plain_heads(head)
    if linears is None:
        raise refused_head(model)
    for linear in linears:
        if type(linear) is nn.Linear:
            exchange_class(linear, LogprobLinear)
    tokens = getattr(head, "token_adapter", None)
    if tokens is None or tokens.disable_adapters or tokens.merged or not tokens.active_adapters:
        return head if tokens is None else linears[0]
    return partial(_with_trained_rows, tokens)


def plain_heads(head: Any) -> list[Any] | None:
    """The nn.Linear that a head is, or those that a wrapper of PEFT for a trained head holds; None for any other."""
    linears = [head]
    if hasattr(head, "modules_to_save"):
        linears = [head.original_module, *head.modules_to_save.values()]
    elif hasattr(head, "token_adapter"):
        linears = [head.token_adapter.base_layer]
    plain = all(type(linear) is nn.Linear or isinstance(linear, LogprobLinear) for linear in linears)  # or FSDP's of it
    return linears if plain else None


def _with_trained_rows(tokens: Any, hidden: Tensor, compute: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
    """LogprobLinear's call on the weight with the rows of PEFT's TrainableTokensLayer, which leaves the bias out."""
    output = compute(hidden, tokens.get_merged_weights(tokens.active_adapters), None)
    return tuple(getattr(output, field.name) for field in fields(output))


def restore_head(model: Any) -> None:
    """Undo logprob_head, in the copies that a wrapper holds as well."""
    for module in model.get_output_embeddings().modules():
        if type(module) is LogprobLinear:
            exchange_class(module, nn.Linear)


def refused_head(model: Any) -> ValueError:
    """The refusal of a head that is no plain nn.Linear."""
    return ValueError(
        f"{type(model).__name__}: expected a plain nn.Linear head, got {type(model.get_output_embeddings()).__name__}: "
        "leave the head out of the adapter's target_modules (modules_to_save=['lm_head'] trains all of it) and "
        "unquantized"
    )


def logit_options(config: Any) -> dict[str, Any]:
    """logit_scale and softcap for linear_logprobs: what a model family does to its logits, read from its config."""
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    # HyperCLOVA X multiplies by it, the others divide
    multiplies = getattr(config, "model_type", None) == "hyperclovax"
    for name in _DIVISORS:
        value = getattr(config, name, None) or 1.0
        scale = scale * value if multiplies and name == "logits_scaling" else scale / value
    softcap = next((value for name in _SOFTCAPS if (value := getattr(config, name, None)) is not None), None)
    return {"logit_scale": scale, "softcap": softcap}
