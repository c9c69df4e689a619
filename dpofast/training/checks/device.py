"""What a run's device needs and costs: kernels that must be there, and choices that are worth a word at the start."""

from __future__ import annotations

from typing import Any

import torch

from dpofast.common.backend import require_triton
from dpofast.training.config import DPOConfig


def check_kernels(device: torch.device) -> None:
    """Raise where the GPU's kernels cannot run: before anything is loaded or tokenized.

    Raises:
        ValueError: no triton beside CUDA.
    """
    if device.type == "cuda":
        require_triton()


def device_notes(args: DPOConfig, model: Any, layers: str | None) -> list[str]:
    """What was chosen on a GPU, and what float32 costs there; to be said once, by one rank.

    Args:
        args: the trainer's.
        model: the policy.
        layers: what compile_chosen returned.
    """
    notes = []
    if args.chose_bf16:
        notes.append("mixed precision in bfloat16, which this GPU has (bf16=False: float32)")
    plain = not (args.bf16 or args.fp16 or args.deepspeed or args.fsdp)
    if args.device.type == "cuda" and plain and model.dtype == torch.float32:
        notes.append(
            "float32 without mixed precision: matrix products run without tensor cores, and attention runs segment by "
            "segment; set bf16=True (fp16=True on a GPU without it), or load the weights in bfloat16 for LoRA"
        )
    return notes if layers is None else [*notes, layers]
