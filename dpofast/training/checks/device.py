"""What a run's device needs and costs: kernels that must be there, and choices that are worth a word at the start."""

from __future__ import annotations

import sys
from typing import Any

import torch

from dpofast.common.backend import require_triton
from dpofast.model.adapters import is_peft
from dpofast.model.parts import base_causal_lm, beside_text
from dpofast.model.vision.tower import tower_parameters
from dpofast.training.config import DPOConfig


def check_kernels(device: torch.device) -> None:
    """Raise where the GPU's kernels cannot run: before anything is loaded or tokenized.

    Raises:
        ValueError: no triton beside CUDA.
    """
    if device.type == "cuda":
        require_triton()


def device_notes(args: DPOConfig, model: Any, layers: str | None, *, with_images: bool = False) -> list[str]:
    """What was chosen on a GPU, what float32 costs there, and what of a vision tower is trained; to be said once.

    Args:
        args: the trainer's.
        model: the policy.
        layers: what compile_chosen returned.
        with_images: whether prompts of the training data have images.
    """
    notes = [trained_vision(model)] if with_images else []
    if args.chose_bf16:
        notes.append("mixed precision in bfloat16, which this GPU has (bf16=False: float32)")
    plain = not (args.bf16 or args.fp16 or args.deepspeed or args.fsdp)
    if args.device.type == "cuda" and plain and model.dtype == torch.float32:
        notes.append(
            "float32 without mixed precision: matrix products run without tensor cores, and attention runs segment by "
            "segment; set bf16=True (fp16=True on a GPU without it), or load the weights in bfloat16 for LoRA"
        )
    return notes if layers is None else [*notes, layers]


def trained_vision(model: Any) -> str:
    """Which parts of a composite model are trained, in a line."""
    base = base_causal_lm(model)
    tower = {id(parameter) for parameter in tower_parameters(model)}
    beside = {id(parameter) for parameter in beside_text(base)}
    text = {id(parameter) for parameter in base.parameters()} - beside
    trained, how = {id(p) for p in base.parameters() if p.requires_grad}, "adapter" if is_peft(model) else "trained"
    parts = {"vision tower": tower, "projector": beside - tower, "language model": text}
    return ", ".join(f"{name}: {how if own & trained else 'frozen'}" for name, own in parts.items())


def print_notes(notes: list[str]) -> None:
    """Print them to standard error."""
    for note in notes:
        print(f"dpofast: {note}", file=sys.stderr)
