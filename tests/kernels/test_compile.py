"""Every kernel, at every tile and dtype, compiled for GPUs that are not here: registers, spills and 16-byte accesses.

Triton cannot compile in the process that runs its interpreter, so this file runs itself as a script in another one.
"""

import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernel_report
from bench.aot import TARGETS, aot_cases
from dpofast.kernels import exp_gemm, exp_rows, gather_kv, preference, scale, token_logprobs
from dpofast.kernels.linear_tiles import ARCHITECTURES, linear_tile, takes_descriptors
from dpofast.kernels.tiles import row_tile

pytestmark = pytest.mark.slow(140)

NVIDIA = [name for name in TARGETS if name.startswith("sm_")]


def compile_everything():
    """Facts about each case by target and name, and what a launch on a CPU tensor says without the interpreter."""
    report = collections.defaultdict(dict)
    for target in TARGETS:
        for case in aot_cases(target):
            report[target][case.name] = dataclasses.asdict(kernel_report.report(case, target))

    ones = torch.ones(1)
    adjacency = preference.pair_adjacency(torch.empty(0, 2, dtype=torch.int32), 1)
    cu_targets = torch.tensor([0, 1], dtype=torch.int32)
    for launch in (
        lambda: token_logprobs.token_logprobs(ones[None], ones.long()),
        lambda: exp_rows.exp_rows(ones[None], ones.long(), exp_out=ones[None].clone()),
        lambda: token_logprobs.token_logprobs_grad(ones[None], ones.long(), ones, ones, ones, out=ones[None]),
        lambda: scale.scale_rows(ones[None], ones[None], ones),
        lambda: scale.scale(ones, ones[0]),
        lambda: exp_gemm.exp_gemm(ones[None], ones[None], ones.long()),
        lambda: preference.preference_sigmoid(ones, cu_targets, adjacency, beta=0.1),
        lambda: gather_kv.gather_kv(ones[:, None, None], ones[:, None, None], torch.zeros(1, dtype=torch.int32)),
        lambda: gather_kv.sum_kv(ones[:, None, None], ones[:, None, None], cu_targets, cu_targets[:1]),
    ):
        try:
            launch()
        except ValueError as error:
            report["cpu_errors"][str(error)] = True
    return report


@pytest.fixture(scope="module")
def report():
    """What compile_everything() returns.

    Triton keeps what it compiled under build/: its key holds the source of a kernel and of all that it calls, the
    constants, target and options, and the versions of Triton and ptxas. A failure is not kept, and the facts are read
    again each time.
    """
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(root / "build" / "triton-cache")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(report, target):
    for name, facts in report[target].items():
        assert facts["spills"] == 0 and facts["stack"] == 0, (name, facts)


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_fits(report, target):
    for name, facts in report[target].items():
        assert facts["shared_bytes"] <= kernel_report.SHARED_LIMITS[target], (name, facts)


@pytest.mark.parametrize("target", TARGETS)
def test_five_programs_share_a_multiprocessor(report, target):
    # 65,536 registers and 256 threads a program on NVIDIA; on gfx942 a SIMD has 512 registers for one of 4 wavefronts.
    # Where V is no multiple of 16, Triton 3.6 leaves room for four programs of the one-read kernel.
    for name, facts in report[target].items():
        if name.endswith("x2048") and "all options x" not in name:
            most = 64 if name.startswith("one read") and "ragged" in name else 48
            assert facts["registers"] <= (most if target in NVIDIA else 96), (name, facts)


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
    # From one read: the tile of the guess, then main loop and tail of the pass, and of the pass that does a row again.
    assert facts["one read fp32, E bf16 x2048"]["wide_loads"] == 2 + 2 * 4
    # Beside the passes' stores, the zeros of an ignored row and the NaN of a broken one.
    assert facts["one read fp32, E bf16 x2048"]["wide_stores"] == 2 * 2 + 2
    ragged = facts["one read fp32, E bf16, ragged V x2048"]
    assert ragged["wide_loads"] == 2 * 2 and ragged["wide_stores"] == 2


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_scaled_16_bytes_at_a_time(report, target):
    facts = report[target]
    # Two stores: a row whose coefficient is 0 is filled.
    for name, loads, stores in (("rows bf16", 1, 2), ("rows fp32 to bf16", 2, 2), ("bf16", 1, 1)):
        assert (facts[f"scale {name}"]["wide_loads"], facts[f"scale {name}"]["wide_stores"]) == (loads, stores), name


@pytest.mark.parametrize("target", NVIDIA)
def test_the_assembler_keeps_the_16_byte_loads(report, target):
    for name, facts in report[target].items():
        if name.startswith("scale rows"):  # it unrolls this loop
            assert facts["wide_load_instructions"] >= facts["wide_loads"] > 0, name
        else:
            assert facts["wide_load_instructions"] == facts["wide_loads"], name


@pytest.mark.parametrize("target", NVIDIA)
def test_in_place_rows_read_the_target_before_any_warp_overwrites_it(report, target):
    accesses = report[target]["logps fp16, E fp16 x2048"]["accesses"]
    barrier = accesses.index("BAR.SYNC")
    # The one 16-bit load is the target's logit; the 16-byte stores before the barrier are the zeros of an ignored row.
    assert accesses.index("LDG.E.U16") < barrier
    assert max(i for i, access in enumerate(accesses) if access == "STG.E.128") > barrier


@pytest.mark.parametrize("target", NVIDIA)
def test_the_targets_entry_of_e_is_stored_after_its_tile(report, target):
    accesses = report[target]["one read fp32, E bf16 x2048"]["accesses"]
    # The one 16-bit store is the target's; the loads of the last pass end before the last stores of a tile.
    target_store = accesses.index("STG.E.U16")
    last_tile = accesses.index("STG.E.128", max(i for i, access in enumerate(accesses) if access == "LDG.E.128"))
    assert "BAR.SYNC" in accesses[last_tile:target_store]


@pytest.mark.parametrize("target", TARGETS)
def test_row_offsets_are_64_bits_wide(report, target):
    for name, facts in report[target].items():
        # A bias, V long, is indexed in 32 bits, and so is a depth D, beside the row's 64; the preference kernel adds
        # constants of 32.
        if name.startswith("linear"):
            assert "i64" in facts["offset_types"], (name, facts)
        elif not name.startswith("preference") and "all options" not in name:
            assert facts["offset_types"] == ["i64"], (name, facts)


@pytest.mark.parametrize("target", TARGETS)
def test_sixteen_bit_heads_run_on_tensor_cores(report, target):
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    for name, facts in report[target].items():
        if name.startswith(("linear bf16", "linear fp16")):
            assert facts["matrix"].keys() == {instruction[target]}, (name, facts)


@pytest.mark.parametrize("target", NVIDIA)
def test_a_float32_head_is_not_rounded_to_tf32(report, target):
    for name, facts in report[target].items():
        if name.startswith("linear fp32"):
            assert facts["matrix"] == {}, (name, facts)


@pytest.mark.parametrize("target", NVIDIA)
def test_tiles_of_the_head_are_copied_in_bulk_or_16_bytes_at_a_time(report, target):
    for name, facts in report[target].items():
        if facts["matrix"] and "odd D" not in name:
            bulk = target != "sm_80" and "guess" not in name and "E fp32" not in name
            assert (facts["bulk_copies"] > 0) == bulk, (name, facts)
            assert bulk or facts["load_bytes"] == 16, (name, facts)


@pytest.mark.parametrize("target", NVIDIA)
def test_tiles_of_e_are_stored_in_bulk_or_16_bytes_at_a_time(report, target):
    for name, facts in report[target].items():
        if name.startswith("linear") and ", E " in name:
            bulk = target in ("sm_90", "sm_100") and "fp32" not in name and "odd D" not in name
            assert (facts["bulk_stores"] > 0) == bulk, (name, facts)
            assert bulk or facts["store_bytes"] == 16, (name, facts)


def test_the_next_product_starts_before_the_last_one_ends(report):
    """On sm_90 a wait that leaves one wgmma pending, in the loop over whole tiles and in that of the last tile."""
    for name, facts in report["sm_90"].items():
        if "wgmma.mma_async" in facts["matrix"] and "odd D" not in name:
            assert facts["pending_waits"] == (1 if "guess" in name else 2), (name, facts)


@pytest.mark.parametrize("target", TARGETS)
def test_key_rows_are_copied_and_summed_16_bytes_at_a_time(report, target):
    for name, facts in report[target].items():
        if name.startswith("gather"):
            # Of K and of V, 2048 entries among 128 threads, or among the 256 of four wavefronts.
            accesses = 4 if target in NVIDIA else 2
            assert facts["load_bytes"] == facts["store_bytes"] == 16, (name, facts)
            assert facts["wide_stores"] == accesses and facts["wide_loads"] >= accesses, (name, facts)
            # Seven programs and more share a multiprocessor's 65,536 registers.
            assert facts["registers"] <= 72, (name, facts)


def test_a_cpu_tensor_without_the_interpreter_is_refused(report):
    errors = sorted(report["cpu_errors"])
    expected = ["grad_key", "hidden", "key", "logits", "logps", "rows", "values"]
    assert [error.partition(":")[0] for error in errors] == expected
    for error in errors:
        assert "expected a tensor on a GPU, got one on the CPU" in error and "TRITON_INTERPRET=1" in error


@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_is_compiled(target):
    cases, backend = aot_cases(target), TARGETS[target].backend
    compiled = {(case.constants["BLOCK_V"], case.num_warps) for case in cases if "logits_ptr" in case.types}
    tiles = [row_tile(vocab_size, backend) for vocab_size in (1, 256, 257, 50_257, 262_144)]
    assert {(tile.BLOCK_V, tile.num_warps) for tile in tiles} == compiled

    compiled = {
        (*(case.constants[name] for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D", "DESCRIPTORS")), "exp" in case.types)
        for case in cases
        if case.kernel is exp_gemm._exp_gemm_kernel and "fp16, E fp32" not in case.name
    }
    tiles = set()
    both = (False, True)
    for dtype, softcap, stores, even in itertools.product((torch.float32, torch.bfloat16), both, both, both):
        if not (dtype == torch.float32 and not stores):
            descriptors = takes_descriptors(target, dtype) and even
            options = {"softcap": softcap, "descriptors": descriptors, "stores": stores, "even": even}
            tile = linear_tile(target, dtype, **options)
            tiles.add((tile.BLOCK_N, tile.BLOCK_V, tile.BLOCK_D, descriptors, stores))
    assert tiles == compiled and set(TARGETS) == set(ARCHITECTURES)


def test_predictions_are_the_bytes_and_operations_over_the_rates():
    predicted = {case.name: kernel_report.predict(case) for case in aot_cases("sm_90")}
    logits = 8192 * 128_256
    assert predicted["logps fp32 x2048"].seconds == pytest.approx(4 * logits / 3e12)
    assert predicted["logps fp32, E bf16 x2048"].seconds == pytest.approx(10 * logits / 3e12)
    assert predicted["one read fp32, E bf16 x2048"].seconds == pytest.approx(6 * logits / 3e12)
    assert predicted["gradient bf16 x2048"].seconds == pytest.approx(4 * logits / 3e12)
    head = predicted["linear bf16, no E 128x256x64"]
    assert 1.0 <= head.seconds / (2 * 4096 * logits / 800e12) < 1.05 and "6 splits" in head.formula
    # No logits; no rate for float32; D = 4096 is not odd.
    for name in ("preference sigmoid", "linear fp32, E fp32 64x64x32", "linear bf16, E bf16, bias, odd D 64x128x32"):
        assert predicted[name] is None


def test_the_report_tells_what_to_unset(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        kernel_report.main([])
    assert "TRITON_INTERPRET=1 leaves nothing to compile: unset it" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="unset it to report"):
        kernel_report.report(aot_cases("sm_90")[0], "sm_90")


if __name__ == "__main__":
    print(json.dumps(compile_everything()))
