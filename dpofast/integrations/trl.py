"""trl's DPOTrainer on dpofast's engine, without a changed line in trl: patch_trl(), unpatch_trl(), report().

    from dpofast.integrations.trl import patch_trl
    patch_trl()
    trainer = trl.DPOTrainer(...)       # and everything else as before

How trl can be entered (its seam) is found by looking for it, not by a version number:

| seam                | trl          | what is replaced                                                              |
|---------------------|--------------|-------------------------------------------------------------------------------|
| fused_lm_head       | 1.15 and on  | the names add_fused_lm_head and DataCollatorForPreference in trl's DPO trainer |
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from dpofast.integrations.trl_forward import LEVELS, FusedOptions, fuse
from dpofast.rows import STATS

_TRAINER = "trl.trainer.dpo_trainer"
_ON_UNPACKABLE = ("raise", "kernel")
_HEAD_PARAMETERS = {"model", "temperature", "cast_lm_head_to_fp32", "outputs"}
_OUTPUT_FIELDS = {"loss", "log_probs", *STATS, "label_mask", "aux_loss"}


@dataclass
class _Patch:
    """What is patched now: the seam, the options, and how to undo it."""

    seam: str
    level: str
    on_unpackable: str
    max_logits_bytes: int | None
    calls: Counter[str] = field(default_factory=Counter)
    models: list[str] = field(default_factory=list)
    former: list[tuple[Any, str, Any]] = field(default_factory=list)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self.former.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    def fuse(self, model: Any, **options: Any) -> None:
        """Give a model its forward, and note which it got."""
        name = type(model).__name__
        shared = FusedOptions(
            self.level, self.on_unpackable, max_logits_bytes=self.max_logits_bytes, calls=self.calls, **options
        )
        reason = fuse(model, shared)
        self.models.append(f"{name}: packed" if reason is None else f"{name}: padded, because {reason}")


_patch: _Patch | None = None


def patch_trl(
    *, level: str = "forward", on_unpackable: str = "raise", max_logits_bytes: int | None = None
) -> None:
    """Make DPOTrainers that are built from now on compute their log-probs with dpofast. Call it before building one.

    Args:
        level: "forward": batches are unpadded and packed, prompts are shared, and only rows that predict a response
            token reach the head. "kernel": the padded forward stays, and only the head is replaced.
        on_unpackable: what happens where a model or a batch cannot be packed: "raise", or "kernel" (the padded
            forward, with dpofast's head).
        max_logits_bytes: room for logits, as in linear_logprobs.

    Raises:
        ValueError: an unknown option, or a trl without a seam that dpofast knows.
        ModuleNotFoundError: trl is not installed.
    """
    global _patch
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {list(LEVELS)}, got {level!r}")
    if on_unpackable not in _ON_UNPACKABLE:
        raise ValueError(f"on_unpackable: expected one of {list(_ON_UNPACKABLE)}, got {on_unpackable!r}")
    module = importlib.import_module(_TRAINER)
    unpatch_trl()
    seam, install = _find_seam(module)
    patch = _Patch(seam, level, on_unpackable, max_logits_bytes)
    install(module, patch)
    _patch = patch


def unpatch_trl() -> None:
    """Put back what patch_trl replaced; without a patch nothing happens. Trainers built in between stay as they are."""
    global _patch
    if _patch is not None:
        for owner, name, value in reversed(_patch.former):
            setattr(owner, name, value)
        _patch = None


def report() -> str:
    """Which path is active and why, in a few lines: the seam, the models, and how their forwards went."""
    version = _trl_version()
    if _patch is None:
        return f"trl {version}: not patched by dpofast"
    lines = [f"trl {version}: patched through {_patch.seam}, level {_patch.level}, unpackable: {_patch.on_unpackable}"]
    lines += [f"model {model}" for model in _patch.models] or ["no model yet: build a DPOTrainer"]
    lines += [f"{count} x {what}" for what, count in _patch.calls.items()] or ["no forward yet"]
    return "\n".join(lines)


def _trl_version() -> str:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _find_seam(module: Any) -> tuple[str, Callable[[Any, _Patch], None]]:
    """The way into this trl, by capability.

    Raises:
        ValueError: none that is known, by what was looked for and found.
    """
    if hasattr(module, "add_fused_lm_head"):
        _check_fused_head(module)
        return "fused_lm_head", _install_fused_head
    trainer = getattr(module, "DPOTrainer", None)
    methods = sorted(name for name in vars(trainer or object) if "loss" in name or "forward" in name)
    raise ValueError(
        f"trl {_trl_version()}: {_TRAINER} has none of the seams that dpofast knows (add_fused_lm_head); its "
        f"DPOTrainer has {methods}. Use a trl that dpofast supports, or dpofast.DPOTrainer"
    )


def _check_fused_head(module: Any) -> None:
    from trl.trainer.utils import FusedCausalLMOutput

    parameters = set(inspect.signature(module.add_fused_lm_head).parameters)
    outputs = {output.name for output in fields(FusedCausalLMOutput)}
    unknown = (parameters ^ _HEAD_PARAMETERS) | (outputs ^ _OUTPUT_FIELDS)
    if unknown:
        raise ValueError(
            f"trl {_trl_version()}: its add_fused_lm_head and FusedCausalLMOutput differ from those that dpofast knows "
            f"in {sorted(unknown)}: use a trl that dpofast supports, or dpofast.DPOTrainer"
        )


def _install_fused_head(module: Any, patch: _Patch) -> None:
    from dpofast.integrations.trl_collator import PackingCollator

    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        """trl's function of this name, on dpofast's engine."""
        unknown = set(outputs) - {"log_probs", *STATS}
        if unknown or cast_lm_head_to_fp32:
            raise ValueError(
                f"add_fused_lm_head under patch_trl(): expected outputs among {['log_probs', *STATS]} and no "
                f"cast_lm_head_to_fp32 (logits are float32 anyway), got {sorted(unknown) or 'cast_lm_head_to_fp32'}"
            )
        patch.fuse(model, temperature=temperature, stats=tuple(name for name in outputs if name != "log_probs"))

    patch.replace(module, "add_fused_lm_head", add_fused_lm_head)
    patch.replace(module, "DataCollatorForPreference", PackingCollator)
