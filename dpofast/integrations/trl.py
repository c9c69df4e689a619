"""trl's DPOTrainer on dpofast's engine, without a changed line in trl: patch_trl(), unpatch_trl(), report().

    from dpofast.integrations.trl import patch_trl
    patch_trl()
    trainer = trl.DPOTrainer(...)       # and everything else as before

Where trl can be entered depends on its version: _trl/seams.py.
"""

from __future__ import annotations

import importlib

from dpofast.integrations._trl.forward import LEVELS
from dpofast.integrations._trl.seams import TRAINER, Patch, find_seam, trl_version

_ON_UNPACKABLE = ("raise", "kernel")
_patch: Patch | None = None


def patch_trl(*, level: str = "forward", on_unpackable: str = "kernel", max_logits_bytes: int | None = None) -> None:
    """Make DPOTrainers that are built from now on compute their log-probs with dpofast. Call it before building one.

    Args:
        level: "forward": batches are unpadded and packed, prompts are shared with their images, and only rows that
            predict a response token reach the head. "kernel": the padded forward stays, and only the head is replaced.
        on_unpackable: what happens where a model or a batch cannot be packed (Mamba 1, Gemma 3's images, NEFTune's
            noise): "kernel" keeps trl's padded forward, with dpofast's head, and warns; "raise" refuses.
        max_logits_bytes: memory for logits, as in linear_logprobs.

    Raises:
        ValueError: an unknown option, or a trl that dpofast has no way into.
        ModuleNotFoundError: trl is not installed.
    """
    global _patch
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {list(LEVELS)}, got {level!r}")
    if on_unpackable not in _ON_UNPACKABLE:
        raise ValueError(f"on_unpackable: expected one of {list(_ON_UNPACKABLE)}, got {on_unpackable!r}")
    module = importlib.import_module(TRAINER)
    unpatch_trl()
    seam = find_seam(module)
    patch = Patch(seam.name, level, on_unpackable, max_logits_bytes)
    seam.install(module, patch)
    _patch = patch


def unpatch_trl() -> None:
    """Restore what patch_trl replaced; without a patch nothing happens. Trainers built in between stay as they are."""
    global _patch
    if _patch is not None:
        _patch.undo()
        _patch = None


def report() -> str:
    """A few lines of text: how trl is patched, which models run packed or why not, and how many forwards did."""
    version = trl_version()
    if _patch is None:
        return f"trl {version}: not patched by dpofast"
    lines = [f"trl {version}: patched through {_patch.seam}, level {_patch.level}, unpackable: {_patch.on_unpackable}"]
    lines += [f"model {model}" for model in _patch.models] or ["no model yet: build a DPOTrainer"]
    lines += [f"{count} x {what}" for what, count in _patch.calls.items()] or ["no forward yet"]
    return "\n".join(lines)
