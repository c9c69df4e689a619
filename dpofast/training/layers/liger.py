"""Liger's fused layers, without its fused loss, whose forward would take the place of the packed one."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers.integrations.liger import apply_liger_kernel

from dpofast.model.parts import base_causal_lm
from dpofast.training.config import DPOConfig


def use_liger_layers(model: nn.Module, args: DPOConfig) -> None:
    """Exchange a model's layers for Liger's, in place: RMSNorm, rotary embeddings and SwiGLU, never the LM head.

    The Trainer applies them again when training begins, which changes nothing; the reference is to run them too.

    Raises:
        ValueError: Liger's loss is asked for; a run on the CPU; no liger-kernel; a family that it does not know.
    """
    config = args.liger_kernel_config or {}
    if config.get("fused_linear_cross_entropy") or config.get("cross_entropy"):
        raise ValueError(
            "liger_kernel_config: expected no cross_entropy and no fused_linear_cross_entropy, which compute another "
            "loss: leave them out; the LM head is fused by dpofast"
        )
    if args.device.type == "cpu":
        raise ValueError(
            "use_liger_kernel: Liger's layers are Triton kernels and need a GPU, and this run is on the CPU: leave it "
            "off there"
        )
    args.liger_kernel_config = {**config, "cross_entropy": False, "fused_linear_cross_entropy": False}
    try:
        apply_liger_kernel(model, args.liger_kernel_config)
    except ImportError as error:
        raise ValueError(f"use_liger_kernel: {error}") from error
    family = base_causal_lm(model).config.model_type
    if family not in _families():  # which Liger passes over without a word
        raise ValueError(
            f"use_liger_kernel: the installed liger-kernel has no layers for {family!r}: leave it off, and the layers "
            "are compiled instead (torch_compile)"
        )


def _families() -> Collection[str]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN
