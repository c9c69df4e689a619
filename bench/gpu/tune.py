"""The part "tune" of bench.gpu: what `dpofast tune` would write for this GPU, by which backend="auto" chooses.

Every head in every mode, backend "triton" beside "fused", at the setting's targets. Nothing is written to the user's
table: lines that hold for others belong into FUSED (dpofast/common/tuning/table.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from bench.gpu.setting import Setting
from dpofast.cli.tune import measure
from dpofast.common.tuning.table import MODES, Measured, device_key, table_lines

# Seconds that must be left for another shape, whose kernels may have to be compiled.
LEAST_S = 6
ROUNDS = 5


def run(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """A piece for each mode and head: the fields of Measured, or None where it does not fit in memory."""
    dry = setting.device.type == "cpu"
    # The interpreter's tl.dot is wrong in bfloat16.
    dtype, rounds = ("float16", 1) if dry else ("bfloat16", ROUNDS)
    yield "device", device_key(setting.device)
    for head in setting.heads:
        for mode in MODES:
            if left() < LEAST_S:
                return
            entry = measure(mode, setting.n, head.d, head.v, dtype, setting.device, rounds)
            yield f"{mode}, D {head.d}", None if entry is None else asdict(entry)


def table(pieces: dict[str, Any]) -> str:
    """The entries as `dpofast tune` prints them."""
    entries = [Measured(**fields) for name, fields in pieces.items() if name != "device" and fields is not None]
    return "\n".join([f"head, triton and fused, {pieces['device']}", *table_lines(entries)])
