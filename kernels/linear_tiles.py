"""Tile sizes of exp_gemm.py for every architecture, and how the vocabulary is split among programs.

A program keeps BLOCK_N × BLOCK_V float32 logits in registers (in tensor memory on sm_100), which is half of the
register file or more. The entries below are the largest tiles that compile without register spills for every option
that they serve (tests/kernels/test_compile.py); softcap's tanh needs additional registers. No entry was timed, and
there is no autotuning at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# 8 row tiles of 128 that share a weight tile while it is in the L2 cache do 2048 operations for each of its elements:
# at 800 TFLOP/s in 16 bits that reads 0.8 TB/s, a quarter of an H100's memory bandwidth.
_SHARING_ROW_TILES = 8
# Time to fill and drain the software pipeline of one program, in units of one tile's time.
_PROGRAM_OVERHEAD = 0.1


@dataclass(frozen=True)
class LinearTile:
    """Rows, columns and depth of one tl.dot, warps per program and stages of the software pipeline."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def architecture_of(device: torch.device) -> str:
    """The entry of ARCHITECTURES whose tiles fit the device.

    Any other NVIDIA GPU, consumer Blackwell (sm_120) included, gets the tiles of sm_80, whose shared memory and tensor
    core instructions it has.
    """
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def takes_descriptors(architecture: str, dtype: torch.dtype) -> bool:
    """Whether tiles are loaded through tensor descriptors, if the tensors' alignment allows it.

    On sm_90 and sm_100 these are bulk copies issued by one thread, which frees the registers that addresses would take,
    and only with them can the pipeline continue across vocabulary tiles. float32 does not run on tensor cores and uses
    small tiles, so it gains nothing.
    """
    return architecture in ("sm_90", "sm_100") and dtype != torch.float32


def linear_tile(
    architecture: str, dtype: torch.dtype, *, softcap: bool, descriptors: bool, stores: bool, even: bool
) -> LinearTile:
    """The tile for one of ARCHITECTURES, the dtype of hidden states and weight, and how they are loaded.

    softcap: its tanh takes registers.
    stores: whether tiles of E are stored, which with descriptors takes shared memory.
    even: rows start at multiples of 16 bytes and D is one of 64; the masks of another depth take registers.
    """
    if dtype == torch.float32:
        return LinearTile(64, 64, 32, num_warps=8, num_stages=2)
    if descriptors:
        if softcap:
            return LinearTile(128, 128, 64, num_warps=8, num_stages=4)
        return LinearTile(128, 256, 64, num_warps=8, num_stages=3 if stores else 4)
    if architecture == "gfx942":
        return LinearTile(128, 128, 64, num_warps=8, num_stages=2)
    return LinearTile(128 if even and not softcap else 64, 128, 32, num_warps=8, num_stages=4)


def guess_tile(dtype: torch.dtype) -> LinearTile:
    """The tile of exp_gemm.py's guess on every architecture: small, so that few rows have enough programs."""
    return LinearTile(64, 64 if dtype == torch.float32 else 128, 32, num_warps=4, num_stages=2)


@lru_cache(maxsize=1024)
def vocab_splits(row_tiles: int, vocab_tiles: int, slots: int, row_tile_bytes: int, cache_bytes: int) -> int:
    """The number of programs among which the vocabulary of one row tile is split, for the shortest estimated time.

    Programs start in order, all splits of a row tile first, so about slots / splits row tiles run at a time. Their
    hidden states are read once per vocabulary tile and should fit into half of the L2 cache, which gives a lower bound
    on the splits. Each weight tile should serve several row tiles while it is in the cache, which gives an upper bound.
    Between the two, the estimated time waves · (vocabulary tiles of a program + overhead) is minimized; ties go to the
    fewest splits.

    Args:
        row_tiles: tiles of rows.
        vocab_tiles: tiles of columns.
        slots: programs that the device runs at the same time.
        row_tile_bytes: bytes of a row tile's hidden states.
        cache_bytes: bytes of the L2 cache.
    """
    cached_row_tiles = max(1, cache_bytes // 2 // max(1, row_tile_bytes))
    least = 1 if row_tiles <= cached_row_tiles else -(-slots // cached_row_tiles)
    most = min(vocab_tiles, max(1, slots // min(row_tiles, _SHARING_ROW_TILES)))

    def time(splits: int) -> float:
        waves = -(-row_tiles * splits // slots)
        return waves * (vocab_tiles / splits + _PROGRAM_OVERHEAD)

    return min(range(min(least, most), most + 1), key=time)
