"""FlashAttention 3 and 4 in varlen, in place of FlashAttention 2, which torch brings: by torch's own hook.

torch.nn.attention.activate_flash_attention_impl registers the kernels of an installed package for the whole process,
for scaled_dot_product_attention too. torch leaves the choice to the user, and so does dpofast.
"""

from __future__ import annotations

import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
)

# Of torch's checks at every call (torch/nn/attention/_fa3.py, _fa4.py): major compute capabilities.
_CAPABILITIES = {"FA3": (9,), "FA4": (9, 10)}
# FlashAttention 4's own limit on compute capability 10; the widest heads are left to others on 9 as well.
_MAX_HEAD_DIM = {"FA4": 128}


def activate_flash_attention(name: str, device: torch.device) -> None:
    """Let varlen run FlashAttention 3 ("FA3") or 4 ("FA4") in this process, or what else is registered with torch.

    torch.nn.attention.restore_flash_attention_impl() goes back to FlashAttention 2.

    Raises:
        ValueError: an unknown name, a device that its kernels do not run on, or a package that is not installed or has
            not the kernels that torch calls.
    """
    known = list_flash_attention_impls()
    if name not in known:
        raise ValueError(f"flash_attention: expected one of {', '.join(known)}, got {name!r}")
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"flash_attention={name!r} needs an NVIDIA GPU, got {device.type}: leave it out")
    if name in _CAPABILITIES:
        major, minor = torch.cuda.get_device_capability(device)
        if major not in _CAPABILITIES[name]:
            wanted = " or ".join(f"{expected}.x" for expected in _CAPABILITIES[name])
            raise ValueError(
                f"flash_attention={name!r} needs compute capability {wanted}, got {major}.{minor}: leave it out, and "
                "torch's FlashAttention 2 runs"
            )
    try:
        activate_flash_attention_impl(name)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"flash_attention={name!r}: {error}: install its package for this torch and this GPU, or leave it out, and "
            "torch's FlashAttention 2 runs"
        ) from error


def active_flash_attention() -> str:
    """The name of the FlashAttention that varlen runs: "FA2", which torch brings, or the one that was activated."""
    return current_flash_attention_impl() or "FA2"


def max_head_dim() -> int:
    """The widest head that the active FlashAttention takes."""
    return _MAX_HEAD_DIM.get(active_flash_attention(), 256)
