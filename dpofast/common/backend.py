"""Choice of the backend, which does the row work of a call: Triton kernels, chunked torch, or the slow reference."""

from __future__ import annotations

import os

import torch

from dpofast.common.tuning.table import HeadCall, fused_is_faster

BACKENDS = ("auto", "triton", "fused", "torch", "reference")


def choose_backend(
    backend: str, device: torch.device, head_dtype: torch.dtype | None = None, call: HeadCall | None = None
) -> str:
    """'triton', 'fused', 'torch' or 'reference' for this device; ValueError where the one asked for cannot run.

    Args:
        backend: one of BACKENDS. On a GPU "auto" is 'triton', or 'fused' where `dpofast tune` measured it to be faster
            (tuning/table.py).
        device: of the call's tensors.
        head_dtype: of hidden states and head, which 'fused' multiplies; None where the call has neither.
        call: its shape and the gradients it needs, for "auto"; None where it has no head.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        if device.type not in ("cuda", "xpu"):
            return "torch"
        sixteen_bit = head_dtype is not None and head_dtype.itemsize == 2
        return "fused" if sixteen_bit and call is not None and fused_is_faster(call, device) else "triton"
    if backend == "fused" and head_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "backend='fused' multiplies hidden states with the head in float32, bfloat16 or float16, got "
            f"{'neither' if head_dtype is None else head_dtype}: use backend='auto'"
        )
    if backend == "fused" and device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(
                f"backend='fused' needs compute capability 8.0 or above, got {major}.{minor}: use backend='triton'"
            )
    if uses_triton(backend) and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend={backend!r} needs a GPU, but the tensors are on the CPU: use backend='auto', "
            "or start Python with TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
        )
    return backend


def head_call(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> HeadCall:
    """The call of an LM head (V, D) on hidden states (N, D), with the gradients that autograd asks of it."""
    needs = torch.is_grad_enabled()
    trains = needs and (weight.requires_grad or (bias is not None and bias.requires_grad))
    mode = "trained" if trains else "frozen" if needs and hidden.requires_grad else "forward"
    (rows, width), vocab = hidden.shape, weight.shape[0]
    return HeadCall(mode, rows, width, vocab, str(weight.dtype).removeprefix("torch."))


def uses_triton(backend: str) -> bool:
    """Whether this chosen backend does its row work in kernels/: 'fused' too, where it needs statistics."""
    return backend in ("triton", "fused")
