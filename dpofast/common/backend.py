"""Choice of the backend, which does the row work of a call: Triton kernels, chunked torch, or the slow reference."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

BACKENDS = ("auto", "triton", "fused", "torch", "reference")

# Asked once: choose_backend is traced by torch.compile.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(backend: str, device: torch.device, head_dtype: torch.dtype | None = None) -> str:
    """'triton', 'fused', 'torch' or 'reference' for this device; ValueError where the one asked for cannot run.

    "auto" stays where a GPU has a head in 16 bits: the engine takes 'triton', or 'fused' for a shape that `dpofast
    tune` measured to be faster so (tuning/table.py).

    head_dtype: of hidden states and head, which 'fused' multiplies; None where the call has neither.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        if device.type not in ("cuda", "xpu"):
            return "torch"
        require_triton()
        return "auto" if head_dtype in (torch.bfloat16, torch.float16) else "triton"
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
    if backend == "fused" and device.type == "cpu" and head_dtype == torch.bfloat16:
        raise ValueError(
            "backend='fused' multiplies in the kernel, and Triton's interpreter multiplies bfloat16 wrongly: use "
            "float32 or float16 there, or backend='triton'"
        )
    if uses_triton(backend):
        require_triton()
    return backend


def require_triton() -> None:
    """Check that triton, in which the GPU's kernels are written, is installed.

    Raises:
        ValueError: it is not, with what to install.
    """
    if not _HAS_TRITON:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        raise ValueError(
            f"backend: expected triton for the kernels of a GPU, got an environment without it: pip install {package} "
            "(of the minor version that this torch was built with; torch's own wheels for CUDA on Linux bring it), or "
            "run on the CPU (use_cpu=True)"
        )


def uses_triton(backend: str) -> bool:
    """Whether this chosen backend does its row work in kernels/."""
    return backend in ("auto", "triton", "fused")
