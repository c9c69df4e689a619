"""`dpofast info`: print installed versions, and which kernels and attention run on this machine."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib import metadata

import torch

from dpofast.common.backend import choose_backend
from dpofast.model.attention.interface import attention_report

_RECURRENT = "tree-recurrence"
_NO_HYBRIDS = "over padded rows: pip install 'dpofast[hybrid]' packs them"


def main(argv: Sequence[str]) -> int:
    """Print, and return 0."""
    argparse.ArgumentParser(prog="dpofast info", description=__doc__).parse_args(argv)
    print(f"dpofast      {metadata.version('dpofast') if _installed('dpofast') else 'source checkout'}")
    print(f"python       {platform.python_version()} on {platform.machine()}")
    for package in ("torch", "triton", "transformers", "datasets", "accelerate", "peft", "bitsandbytes"):
        print(f"{package:<12} {metadata.version(package) if _installed(package) else 'not installed'}")
    hybrids = f"packed, by {_RECURRENT} {metadata.version(_RECURRENT)}" if _installed(_RECURRENT) else _NO_HYBRIDS
    print(f"hybrids      {hybrids}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    why = "a GPU runs the Triton kernels" if device.type in ("cuda", "xpu") else "no GPU: chunked torch, multi-threaded"
    print(f"device       {device.type} ({name})")
    print(f"log-probs    backend {choose_backend('auto', device)}: {why}")
    for kind, backend in attention_report(device).items():
        print(f"attention    {kind}: {backend}")
    print("packing      dpofast._C (C++)")
    return 0


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
