"""Direct Preference Optimization with custom kernels. The public names, imported when first used."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "DPOConfig": "dpofast.config",
    "DPOTrainer": "dpofast.trainer",
    "DataError": "dpofast.data",
    "LogprobOutput": "dpofast.logprobs",
    "PackBuffers": "dpofast.packing",
    "PackedBatch": "dpofast.packing",
    "PackingCollator": "dpofast.collator",
    "PreferenceLoss": "dpofast.preference",
    "PreferenceOutput": "dpofast.preference",
    "PromptGroupSampler": "dpofast.collator",
    "attach_logprob_head": "dpofast.model",
    "detach_logprob_head": "dpofast.model",
    "group_by_prompt": "dpofast.collator",
    "linear_logprobs": "dpofast.logprobs",
    "linear_preference_loss": "dpofast.linear_preference",
    "load_preferences": "dpofast.data",
    "logprobs": "dpofast.logprobs",
    "pack": "dpofast.packing",
    "pair_logprobs": "dpofast.pair_terms",
    "preference_loss": "dpofast.preference",
    "sequence_logprobs": "dpofast.model",
    "token_preference_loss": "dpofast.preference",
    "tokenize_preferences": "dpofast.data",
}
__all__ = ["__version__", *_MODULES]

# What a type checker sees of the table above, and what runs.
if TYPE_CHECKING:
    from dpofast.collator import PackingCollator as PackingCollator
    from dpofast.collator import PromptGroupSampler as PromptGroupSampler
    from dpofast.collator import group_by_prompt as group_by_prompt
    from dpofast.config import DPOConfig as DPOConfig
    from dpofast.data import DataError as DataError
    from dpofast.data import load_preferences as load_preferences
    from dpofast.data import tokenize_preferences as tokenize_preferences
    from dpofast.linear_preference import linear_preference_loss as linear_preference_loss
    from dpofast.logprobs import LogprobOutput as LogprobOutput
    from dpofast.logprobs import linear_logprobs as linear_logprobs
    from dpofast.logprobs import logprobs as logprobs
    from dpofast.model import attach_logprob_head as attach_logprob_head
    from dpofast.model import detach_logprob_head as detach_logprob_head
    from dpofast.model import sequence_logprobs as sequence_logprobs
    from dpofast.packing import PackBuffers as PackBuffers
    from dpofast.packing import PackedBatch as PackedBatch
    from dpofast.packing import pack as pack
    from dpofast.pair_terms import pair_logprobs as pair_logprobs
    from dpofast.preference import PreferenceLoss as PreferenceLoss
    from dpofast.preference import PreferenceOutput as PreferenceOutput
    from dpofast.preference import preference_loss as preference_loss
    from dpofast.preference import token_preference_loss as token_preference_loss
    from dpofast.trainer import DPOTrainer as DPOTrainer
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


class _Package(ModuleType):
    """Keeps `dpofast.logprobs` the function: importing a submodule would bind the package's attribute to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
