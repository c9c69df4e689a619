"""Random numbers of a forward in train mode: nn.Dropout, rates that layers pass to functional dropout, router noise."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Rates that layers keep as numbers: attention_dropout, resid_pdrop, layerdrop, jitter_noise, moe_jitter_eps. PhiMoE's
# router_jitter_noise is a threshold in eval mode too.
_RATE = re.compile("drop|(?<!router_)jitter")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and router noise of the model to 0: modules, and rates that layers keep as numbers."""
    for module in model.modules():
        for name in _active(module):
            setattr(module, name, 0.0)


def active_dropout(model: nn.Module) -> dict[str, float]:
    """The rates above 0, by the name of their module and attribute."""
    return {
        f"{path}.{name}".lstrip("."): getattr(module, name)
        for path, module in model.named_modules()
        for name in _active(module)
    }


def check_rates(model: nn.Module) -> None:
    """Check that every rate of dropout that layers keep is one: a config may hold null, or a number below 0.

    Raises:
        ValueError: one is not, by its name.
    """
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            number = isinstance(value, float) and "drop" in name
            if (number and not 0 <= value <= 1) or (name == "attention_dropout" and value is None):
                raise ValueError(
                    f"{type(model).__name__}: expected a rate between 0 and 1 as {path}.{name}, got {value}: correct "
                    "its config (config.json), with 0 for no dropout"
                )


def config_rates(model: nn.Module) -> list[str]:
    """Names of rates above 0 in the model's configs, which a few layers read while they run."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return sorted(
        {name for config in configs.values() for name, value in vars(config).items() if _is_rate(name, value)}
    )


def _active(module: nn.Module) -> list[str]:
    names = [name for name, value in vars(module).items() if _is_rate(name, value)]
    if isinstance(module, _DropoutNd) and module.p > 0:
        names.append("p")
    return names


def _is_rate(name: str, value: Any) -> bool:
    return isinstance(value, float) and value > 0 and _RATE.search(name) is not None
