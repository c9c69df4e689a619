"""Compile every kernel without a GPU; report registers, spills, load widths, tensor cores and a predicted time.

    python -m bench.kernel_report [--architectures sm_90 ...] [--json bench/results/kernel_report.jsonl]

tests/kernels/test_compile.py asserts on the numbers of report(). The times are predictions: bytes and operations that
the kernel must do, at rates that an H100 reaches (800 TFLOP/s in 16 bits, 3.0 TB/s), and not measurements.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from bench.aot import TARGETS, AotCase, aot_cases
from bench.record import write_record
from dpofast.kernels.linear_tiles import vocab_splits
from dpofast.kernels.tiles import row_tile

# Shared memory that one program may have, in bytes.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

# The H100 of the predictions, and the problem: Llama 3's head, 8192 targets.
FLOP_PER_SECOND, BYTES_PER_SECOND = 800e12, 3.0e12
MULTIPROCESSORS, CACHE_BYTES = 132, 50 << 20
N, D, V = 8192, 4096, 128_256

_BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
_MATRIX = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """Facts of one kernel compiled for one architecture.

    Attributes:
        registers: per thread (gfx942: vector registers).
        stack: bytes of stack per thread, which spilled registers take; 0 on gfx942, where `spills` tells all.
        spills: instructions that load or store the stack (gfx942: spilled vector registers).
        shared_bytes: shared memory of a program.
        load_bytes, store_bytes: widest access of one thread to global memory; a bulk copy is none.
        wide_loads, wide_stores: 16-byte accesses in the PTX (gfx942: in the assembly).
        wide_load_instructions: 16-byte loads that the assembler kept (gfx942: wide_loads).
        matrix: the tensor cores' instruction and how often it stands in the code, or none.
        bulk_copies, bulk_stores: copies of whole tiles by tensor descriptor, from and to global memory.
        pending_waits: waits that leave a product of the tensor cores pending (sm_90).
        offset_types: Triton types of what is added to pointers.
        accesses: barriers and global accesses in order, as the assembler left them (NVIDIA).
    """

    registers: int
    stack: int
    spills: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int
    wide_loads: int
    wide_stores: int
    wide_load_instructions: int
    matrix: dict[str, int]
    bulk_copies: int
    bulk_stores: int
    pending_waits: int
    offset_types: list[str]
    accesses: list[str]


def report(case: AotCase, architecture: str) -> KernelFacts:
    """Compile a case for one of TARGETS and read the result.

    Raises:
        RuntimeError: Triton's interpreter is on in this process, which leaves nothing to compile.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it to report on the kernels")
    compiled = case.compile(TARGETS[architecture])
    # tt.addptr %pointer, %offset : type of pointer, type of offset
    offsets = re.findall(r"tt\.addptr [^:]*: .*, (?:tensor<[\dx]+x)?(i\d+)>?", compiled.asm["ttir"])
    read = _amd_facts if TARGETS[architecture].backend == "hip" else _nvidia_facts
    return KernelFacts(shared_bytes=compiled.metadata.shared, offset_types=sorted(set(offsets)), **read(compiled.asm))


def _matrix(assembly: str) -> dict[str, int]:
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", assembly)) for name in _MATRIX}
    return {name: count for name, count in counts.items() if count}


def _nvidia_tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia_facts(asm: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = _nvidia_tool("nvdisasm", "-c", str(cubin))
    ptx = asm["ptx"]

    def widths(kind: str) -> list[int]:
        found = re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
        return [int(vector or 1) * int(bits) // 8 for vector, bits in found]

    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[\da-f]+|\d+)", ptx)
    loads, stores = widths("ld"), widths("st")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "load_bytes": max([*loads, *(int(size, 0) for size in copies)], default=0),
        "store_bytes": max(stores, default=0),
        "wide_loads": loads.count(16),
        "wide_stores": stores.count(16),
        "wide_load_instructions": len(re.findall(r"\bLDG\.E\.128", sass)),
        "matrix": _matrix(ptx),
        "bulk_copies": len(re.findall(r"\bcp\.async\.bulk\.tensor\S*\.shared::\S*global", ptx)),
        "bulk_stores": len(re.findall(r"\bcp\.async\.bulk\.tensor\S*\.global\.shared::", ptx)),
        "pending_waits": len(re.findall(r"\bwgmma\.wait_group\.sync\.aligned [1-9]", ptx)),
        "accesses": re.findall(r"\b(?:BAR\.SYNC|(?:LDG|STG)\.E\S*)", sass),
    }


def _amd_facts(asm: dict[str, Any]) -> dict[str, Any]:
    assembly = asm["amdgcn"]

    def widths(kind: str) -> list[int]:
        names = re.findall(rf"\b(?:global|buffer)_{kind}_(\w+)", assembly)
        return [size for name in names for suffix, size in _AMD_BYTES.items() if name.split("_")[0] == suffix]

    loads, stores = widths("load"), widths("store")
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),
        "stack": 0,
        "spills": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1]),
        "load_bytes": max(loads, default=0),
        "store_bytes": max(stores, default=0),
        "wide_loads": loads.count(16),
        "wide_stores": stores.count(16),
        "wide_load_instructions": loads.count(16),
        "matrix": _matrix(assembly),
        "bulk_copies": 0,
        "bulk_stores": 0,
        "pending_waits": 0,
        "accesses": [],
    }


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds on the H100 of this module, and the formula with its numbers."""

    seconds: float
    formula: str


def predict(case: AotCase) -> Prediction | None:
    """For a kernel over (N, V) logits, or over hidden states and head in 16 bits; None where N, D or V do not fit."""
    types, constants = case.types, case.constants
    if "logits_ptr" in types:
        if constants["BLOCK_V"] != row_tile(V).BLOCK_V:
            return None
        once = _BYTES[types["logits_ptr"]]
        out = _BYTES.get(types.get("out_ptr", ""), 0)
        # E needs the row's maximum, and so a second read, or a guess of it (exp_rows.py: here, one that is good).
        again = once if "exp_ptr" in types and "shift_ptr" not in types else 0
        per_logit = once + again + _BYTES.get(types.get("exp_ptr", ""), 0) + out
        return Prediction(N * V * per_logit / BYTES_PER_SECOND, f"N·V·{per_logit} bytes / 3.0 TB/s")
    if "hidden" not in types or "fp32" in types["hidden"] or not constants["EVEN_D"]:
        return None
    row_tiles, vocab_tiles = -(-N // constants["BLOCK_N"]), -(-V // constants["BLOCK_V"])
    splits = vocab_splits(row_tiles, vocab_tiles, MULTIPROCESSORS, constants["BLOCK_N"] * D * 2, CACHE_BYTES)
    waves = -(-row_tiles * splits // MULTIPROCESSORS)
    efficiency = row_tiles * splits / (waves * MULTIPROCESSORS)
    arithmetic = 2 * N * D * V / FLOP_PER_SECOND / efficiency
    # Row tiles that run together read W once; the target's rows of h and W are read again.
    memory = (waves * V + 3 * N) * D * 2 / BYTES_PER_SECOND
    return Prediction(
        max(arithmetic, memory),
        f"max(2·N·D·V / 800 TFLOP/s / {efficiency:.3f} of {MULTIPROCESSORS} busy with {splits} splits = "
        f"{arithmetic * 1e3:.2f}, ({waves}·V + 3·N)·D·2 bytes / 3.0 TB/s = {memory * 1e3:.2f}) ms, "
        "without the epilogue's exponentials",
    )


def _row(name: str, facts: KernelFacts, prediction: Prediction | None) -> str:
    matrix = " ".join(f"{instruction} {count}" for instruction, count in facts.matrix.items()) or "-"
    time = f"{prediction.seconds * 1e3:7.2f}" if prediction else "      -"
    return (
        f"  {name:<44} {facts.registers:>4} {facts.shared_bytes:>7} {facts.stack:>5} {facts.spills:>6} "
        f"{facts.load_bytes:>4} {facts.store_bytes:>5} {facts.bulk_copies:>4}  {matrix:<20} {time}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table an architecture; returns the number of kernels that spill."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="append the figures to this .jsonl file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")

    figures: dict[str, Any] = {}
    formulas: dict[str, Prediction] = {}
    spilling = 0
    for architecture in options.architectures:
        print(f"{architecture}: at most {SHARED_LIMITS[architecture]} bytes of shared memory a program")
        print(f"  {'kernel':<44} regs  shared stack spills load store bulk  {'tensor cores':<20} H100 ms, predicted")
        figures[architecture] = {}
        for case in aot_cases(architecture):
            facts = report(case, architecture)
            prediction = predict(case) if architecture == "sm_90" else None
            print(_row(case.name, facts, prediction), flush=True)
            spilling += facts.stack > 0 or facts.spills > 0
            entry = dataclasses.asdict(facts)
            del entry["accesses"]
            if prediction:
                formulas[case.name] = prediction
                entry["predicted_ms_h100"] = prediction.seconds * 1e3
            figures[architecture][case.name] = entry
    print("load, store: bytes of one thread's widest access; bulk: copies of whole tiles through tensor descriptors")
    if formulas:
        print(f"\nThe times are PREDICTIONS, nothing ran on a GPU: N = {N}, D = {D}, V = {V}, at an H100's rates.")
        for name, prediction in formulas.items():
            print(f"  {name}: {prediction.formula}")
    if options.json:
        command = "python -m bench.kernel_report"
        if options.architectures != list(TARGETS):
            command += f" --architectures {' '.join(options.architectures)}"
        write_record(options.json, "kernel_report", figures, command=command, packages=("torch", "triton"))
    return spilling


if __name__ == "__main__":
    sys.exit(main())
