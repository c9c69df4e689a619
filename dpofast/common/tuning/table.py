"""The tuned table: times of the backends "triton" and "fused" for calls of the LM head, measured by `dpofast tune`.

A JSON file, {"format": 1, "devices": {device: [entries]}}; a device is a GPU's name and architecture with the versions
of torch and Triton, and what was measured for another one says nothing. backend="auto" takes "fused" for a call whose
nearest measured shape was faster with it, and "triton" where nothing near was measured.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dpofast.common.atomic_files import put

FORMAT = 1
MODES = ("forward", "frozen", "trained")
# Largest ratio between a call's size and that of an entry that stands for it.
_NEAR = {"rows": 4.0, "width": 1.5, "vocab": 2.0}


@dataclass(frozen=True)
class HeadCall:
    """A call of the LM head: one of MODES (which gradients it needs), N, D, V, and the dtype of head and hidden."""

    mode: str
    rows: int
    width: int
    vocab: int
    dtype: str


@dataclass(frozen=True)
class Measured:
    """A call and its median times in milliseconds."""

    mode: str
    rows: int
    width: int
    vocab: int
    dtype: str
    triton_ms: float
    fused_ms: float

    def __str__(self) -> str:
        """One line for the terminal."""
        shape = f"N={self.rows} D={self.width} V={self.vocab} {self.dtype}"
        ratio = self.fused_ms / self.triton_ms
        return f"{self.mode:<8} {shape:<36} {self.triton_ms:9.3f} {self.fused_ms:9.3f} ms  fused/triton {ratio:.3f}"


# What ships with dpofast, by architecture (kernels/linear_tiles.py). None yet: no GPU of any has been measured.
FUSED: dict[str, tuple[Measured, ...]] = {}


def table_path() -> Path:
    """Where the table of this user is: $DPOFAST_TUNED, else dpofast/tuned.json in the user's cache folder."""
    if path := os.environ.get("DPOFAST_TUNED"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpofast" / "tuned.json"


def device_key(device: torch.device) -> str:
    """What a measurement holds for: the GPU, its architecture, torch and Triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"{name}, {architecture(device)}, torch {torch.__version__}, triton {triton}"


def architecture(device: torch.device) -> str:
    """The device's entry of kernels/linear_tiles.py's ARCHITECTURES."""
    from dpofast.kernels.linear_tiles import architecture_of

    return architecture_of(device)


def read_table(path: Path) -> dict[str, tuple[Measured, ...]]:
    """Entries by device; {} where there is no file.

    Raises:
        ValueError: the file is no table of this format.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return {name: tuple(map(_entry, entries)) for name, entries in content["devices"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a table of format {FORMAT} as `dpofast tune` writes it, got {error}: delete it, or run "
            "`dpofast tune --overwrite`"
        ) from None


def _entry(values: dict[str, Any]) -> Measured:
    entry = Measured(**values)
    sizes = all(type(value) is int and value > 0 for value in (entry.rows, entry.width, entry.vocab))
    times = all(type(value) is float and 0 < value < math.inf for value in (entry.triton_ms, entry.fused_ms))
    if entry.mode not in MODES or type(entry.dtype) is not str or not sizes or not times:
        raise ValueError(f"the entry {values}")
    return entry


def write_entries(path: Path, device: str, entries: Sequence[Measured], *, overwrite: bool) -> None:
    """Add entries of a device to the file, atomically; those of the same calls are replaced. overwrite: alone."""
    table = {} if overwrite else read_table(path)
    known = {_call(entry): entry for entry in (*table.get(device, ()), *entries)}
    table[device] = tuple(known.values())
    devices = {name: [asdict(entry) for entry in measured] for name, measured in table.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps({"format": FORMAT, "devices": devices}, indent=1) + "\n", "utf-8")
        put(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _call(measured: Measured) -> HeadCall:
    return HeadCall(*(getattr(measured, field.name) for field in fields(HeadCall)))


def nearest(call: HeadCall, entries: Sequence[Measured]) -> Measured | None:
    """The entry of the same mode and dtype whose shape is nearest, by the product of the ratios; None: none is near."""

    def ratio(entry: Measured, size: str) -> float:
        one, other = getattr(entry, size), getattr(call, size)
        return max(one, other) / min(one, other)

    alike = [entry for entry in entries if (entry.mode, entry.dtype) == (call.mode, call.dtype)]
    near = [entry for entry in alike if all(ratio(entry, size) <= most for size, most in _NEAR.items())]
    return min(near, key=lambda entry: math.prod(ratio(entry, size) for size in _NEAR), default=None)


def fused_is_faster(call: HeadCall, device: torch.device) -> bool:
    """Whether the nearest shape that was measured on such a device was faster by the backend "fused".

    This user's table counts where it has a shape that is near, else what ships with dpofast.
    """
    if min(call.rows, call.width, call.vocab) < 1:
        return False
    found = nearest(call, tuned_entries(device)) or nearest(call, FUSED.get(architecture(device), ()))
    return found is not None and found.fused_ms < found.triton_ms


def tuned_entries(device: torch.device) -> tuple[Measured, ...]:
    """What this user's table has for the device. The file is read once a process."""
    return _read_once(table_path()).get(_key_once(device), ())


_read_once = lru_cache(maxsize=8)(read_table)
_key_once = lru_cache(maxsize=16)(device_key)


def table_lines(entries: Sequence[Measured]) -> list[str]:
    """The table as text, one line a shape."""
    return [str(entry) for entry in sorted(entries, key=lambda entry: (entry.mode, entry.width, entry.rows))]
