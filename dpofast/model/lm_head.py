"""The LM head of an attached model: LogprobLinear, and what a model family does to its logits.

A fused head reads the weight itself. FSDP2 and DeepSpeed's ZeRO-3 gather a sharded weight in hooks around the layer's
call and free it afterwards, so the fused computation has to run inside that call: the head's class is exchanged once,
when the model is attached, and head(hidden, compute=...) runs it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

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

    def forward(self, input: Tensor, compute: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None) -> Any:
        """Logits (..., V) of input (..., D), or the fields of the dataclass compute(input, weight, bias).

        The fields come as a tuple: hooks that prepare the backward look for tensors there and not in a dataclass.
        """
        if compute is None:
            return super().forward(input)
        output = compute(input, self.weight, self.bias)
        return tuple(getattr(output, field.name) for field in fields(output))


def logprob_head(model: Any) -> Any:
    """The model's head, ready for `compute`: an nn.Linear becomes a LogprobLinear.

    Asked for before each call, because a head may be exchanged after the model was attached: resize_token_embeddings
    makes a new nn.Linear, and PEFT's modules_to_save wraps the head and passes calls on to the copy that is active.

    Raises:
        ValueError: a head that is neither, such as one with an adapter.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = LogprobLinear
    if not isinstance(head, LogprobLinear) and not hasattr(head, "modules_to_save"):
        raise refused_head(model)
    return head


def restore_head(model: Any) -> None:
    """Undo logprob_head, in the copies that a wrapper holds as well."""
    plain: Any = nn.Linear
    for module in model.get_output_embeddings().modules():
        if type(module) is LogprobLinear:
            module.__class__ = plain


def refused_head(model: Any) -> ValueError:
    """The refusal of a head that is no plain nn.Linear."""
    return ValueError(
        f"{type(model).__name__}: expected a plain nn.Linear head, got {type(model.get_output_embeddings()).__name__}: "
        "leave the head out of the adapter's target_modules and unquantized"
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
