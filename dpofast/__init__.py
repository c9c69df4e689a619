"""Direct Preference Optimization with custom kernels. The public names, imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

from dpofast._version import __version__

_MODULES = {
    "DPOConfig": "dpofast.training.config",
    "DPOTrainer": "dpofast.training.trainer",
    "DataError": "dpofast.data.load",
    "Lists": "dpofast.losses.pairs",
    "LogprobOutput": "dpofast.head.options",
    "LossOptions": "dpofast.losses.options",
    "PackBuffers": "dpofast.packing.pack",
    "PackedBatch": "dpofast.packing.batch",
    "PackedPreference": "dpofast.model.attach",
    "PackingCollator": "dpofast.packing.collator",
    "Pairs": "dpofast.losses.pairs",
    "PreferenceLoss": "dpofast.losses.config",
    "PreferenceOutput": "dpofast.losses.functional",
    "PromptGroupSampler": "dpofast.packing.collator",
    "PromptImages": "dpofast.data.images.prompt_images",
    "ReportCallback": "dpofast.report.page",
    "attach_logprob_head": "dpofast.model.attach",
    "detach_logprob_head": "dpofast.model.attach",
    "fuse_lora": "dpofast.model.lora",
    "group_by_prompt": "dpofast.packing.collator",
    "linear_logprobs": "dpofast.head.linear_logprobs",
    "linear_preference_loss": "dpofast.head.linear_preference",
    "load_preferences": "dpofast.data.load",
    "logprobs": "dpofast.head.token_logprobs",
    "pack": "dpofast.packing.pack",
    "pair_logprobs": "dpofast.losses.sequences",
    "preference_kind": "dpofast.losses.own_kinds",
    "preference_loss": "dpofast.losses.functional",
    "preview_preferences": "dpofast.data.preview",
    "sequence_logprobs": "dpofast.model.attach",
    "token_preference_loss": "dpofast.losses.functional",
    "tokenize_preferences": "dpofast.data.load",
    "vision_inputs": "dpofast.model.vision.inputs",
}
__all__ = ["__version__", *_MODULES]

# What a type checker sees of the table above, and what runs.
if TYPE_CHECKING:
    from dpofast.data.images.prompt_images import PromptImages as PromptImages
    from dpofast.data.load import DataError as DataError
    from dpofast.data.load import load_preferences as load_preferences
    from dpofast.data.load import tokenize_preferences as tokenize_preferences
    from dpofast.data.preview import preview_preferences as preview_preferences
    from dpofast.head.linear_logprobs import linear_logprobs as linear_logprobs
    from dpofast.head.linear_preference import linear_preference_loss as linear_preference_loss
    from dpofast.head.options import LogprobOutput as LogprobOutput
    from dpofast.head.token_logprobs import logprobs as logprobs
    from dpofast.losses.config import PreferenceLoss as PreferenceLoss
    from dpofast.losses.functional import PreferenceOutput as PreferenceOutput
    from dpofast.losses.functional import preference_loss as preference_loss
    from dpofast.losses.functional import token_preference_loss as token_preference_loss
    from dpofast.losses.options import LossOptions as LossOptions
    from dpofast.losses.own_kinds import preference_kind as preference_kind
    from dpofast.losses.pairs import Lists as Lists
    from dpofast.losses.pairs import Pairs as Pairs
    from dpofast.losses.sequences import pair_logprobs as pair_logprobs
    from dpofast.model.attach import PackedPreference as PackedPreference
    from dpofast.model.attach import attach_logprob_head as attach_logprob_head
    from dpofast.model.attach import detach_logprob_head as detach_logprob_head
    from dpofast.model.attach import sequence_logprobs as sequence_logprobs
    from dpofast.model.lora import fuse_lora as fuse_lora
    from dpofast.model.vision.inputs import vision_inputs as vision_inputs
    from dpofast.packing.batch import PackedBatch as PackedBatch
    from dpofast.packing.collator import PackingCollator as PackingCollator
    from dpofast.packing.collator import PromptGroupSampler as PromptGroupSampler
    from dpofast.packing.collator import group_by_prompt as group_by_prompt
    from dpofast.packing.pack import PackBuffers as PackBuffers
    from dpofast.packing.pack import pack as pack
    from dpofast.report.page import ReportCallback as ReportCallback
    from dpofast.training.config import DPOConfig as DPOConfig
    from dpofast.training.trainer import DPOTrainer as DPOTrainer
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
