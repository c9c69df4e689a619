"""Every kernel, at every tile and dtype, compiled for GPUs that are not here: registers, spills and 16-byte accesses.

Triton cannot compile in the process that runs its interpreter, so this file runs itself as a script in another one.
"""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from dpofast.kernels import preference, token_logprobs
from dpofast.kernels.aot import aot_cases
from dpofast.kernels.tiles import row_tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]


def tool(name, *arguments):
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def cuda_facts(compiled, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = tool("cuobjdump", "--dump-resource-usage", str(cubin))
    sass = tool("nvdisasm", "-c", str(cubin))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"])),
        "wide_load_instructions": len(re.findall(r"\bLDG\.E\.128", sass)),
        "accesses": re.findall(r"\b(?:BAR\.SYNC|(?:LDG|STG)\.E\S*)", sass),
    }


def hip_facts(compiled, folder):
    assembly = compiled.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1]),
        "wide_loads": len(re.findall(r"\bglobal_load_dwordx4\b", assembly)),
        "wide_stores": len(re.findall(r"\bglobal_store_dwordx4\b", assembly)),
    }


def compile_everything(folder):
    """Facts about each case by target and name, and what a launch on a CPU tensor says without the interpreter."""
    report = collections.defaultdict(dict)
    for target_name, target in TARGETS.items():
        for case in aot_cases(target.backend):
            compiled = case.compile(target)
            facts = (cuda_facts if target.backend == "cuda" else hip_facts)(compiled, folder)
            # tt.addptr %pointer, %offset : type of pointer, type of offset
            offsets = re.findall(r"tt\.addptr [^:]*: .*, (?:tensor<\w+x)?(i\d+)>?", compiled.asm["ttir"])
            facts["offset_types"] = sorted(set(offsets))
            report[target_name][case.name] = facts

    ones = torch.ones(1)
    adjacency = preference.pair_adjacency(torch.empty(0, 2, dtype=torch.int32), 1)
    cu_targets = torch.tensor([0, 1], dtype=torch.int32)
    for launch in (
        lambda: token_logprobs.token_logprobs(ones[None], ones.long()),
        lambda: token_logprobs.token_logprobs_grad(ones[None], ones.long(), ones, ones, ones, out=ones[None]),
        lambda: preference.preference_sigmoid(ones, cu_targets, adjacency, beta=0.1),
    ):
        try:
            launch()
        except ValueError as error:
            report["cpu_errors"][str(error)] = True
    return report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = Path(__file__).resolve().parent.parent
    folder = tmp_path_factory.mktemp("compiled")
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "cache")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(report, target):
    for name, facts in report[target].items():
        assert facts["spills"] == 0 and facts.get("stack", 0) == 0, (name, facts)


@pytest.mark.parametrize("target", TARGETS)
def test_five_programs_share_a_multiprocessor(report, target):
    # 65,536 registers and 256 threads a program on NVIDIA; on gfx942 a SIMD has 512 registers for one of 4 wavefronts.
    for name, facts in report[target].items():
        if name.endswith("x2048") and "all options x" not in name:
            assert facts["registers"] <= (48 if target in NVIDIA else 96), (name, facts)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_read_and_written_16_bytes_at_a_time(report, target):
    facts = report[target]
    # 8 columns a thread: two 16-byte accesses in float32, one in 16 bits, each in the main loop and in the tail.
    assert facts["logps fp32 x2048"]["wide_loads"] == 4
    assert facts["logps fp16, E fp16 x2048"]["wide_loads"] == 4
    assert facts["logps fp32, E bf16 x2048"]["wide_loads"] == 8
    assert facts["gradient bf16 x2048"]["wide_loads"] == 2
    assert facts["gradient fp32 x2048"]["wide_loads"] == 4
    # One store more than main loop and tail: the zeros of an ignored row.
    assert facts["logps fp32, E bf16 x2048"]["wide_stores"] == 3
    assert facts["gradient bf16 x2048"]["wide_stores"] == 3
    assert facts["gradient fp32 x2048"]["wide_stores"] == 6
    # A vocabulary that no 16 divides costs only the tail its wide accesses (and the zeros theirs).
    ragged = facts["logps fp32, E bf16, ragged V x2048"]
    assert ragged["wide_loads"] == 4 and ragged["wide_stores"] == 1


@pytest.mark.parametrize("target", NVIDIA)
def test_the_assembler_keeps_the_16_byte_loads(report, target):
    for name, facts in report[target].items():
        assert facts["wide_load_instructions"] == facts["wide_loads"], name


@pytest.mark.parametrize("target", NVIDIA)
def test_in_place_rows_read_the_target_before_any_warp_overwrites_it(report, target):
    accesses = report[target]["logps fp16, E fp16 x2048"]["accesses"]
    barrier = accesses.index("BAR.SYNC")
    # The one 16-bit load is the target's logit; the 16-byte stores before the barrier are the zeros of an ignored row.
    assert accesses.index("LDG.E.U16") < barrier
    assert max(i for i, access in enumerate(accesses) if access == "STG.E.128") > barrier


@pytest.mark.parametrize("target", TARGETS)
def test_row_offsets_are_64_bits_wide(report, target):
    for name, facts in report[target].items():
        # A bias, V long, is indexed in 32 bits, and the preference kernel adds constants of 32.
        if not name.startswith("preference") and "all options" not in name:
            assert facts["offset_types"] == ["i64"], (name, facts)


def test_a_cpu_tensor_without_the_interpreter_is_refused(report):
    errors = sorted(report["cpu_errors"])
    assert [error.partition(":")[0] for error in errors] == ["logits", "logps"]
    for error in errors:
        assert "expected a tensor on a GPU, got one on the CPU" in error and "TRITON_INTERPRET=1" in error


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_every_tile_is_compiled(backend):
    row_cases = [case for case in aot_cases(backend) if "BLOCK_V" in case.constants]
    compiled = {(case.constants["BLOCK_V"], case.num_warps) for case in row_cases}
    tiles = [row_tile(vocab_size, backend) for vocab_size in (1, 256, 257, 50_257, 262_144)]
    assert {(tile.BLOCK_V, tile.num_warps) for tile in tiles} == compiled


if __name__ == "__main__":
    print(json.dumps(compile_everything(Path(sys.argv[1]))))
