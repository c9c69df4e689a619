"""What the head asks of a GPU, counted without one: the engine's own code on meta tensors that stand for an H100's.

The case is Llama 3's head with 8,192 targets in bfloat16. Nothing here is a time of a GPU: the ratios are predictions
of bench/head/predict.py.
"""

import re
from unittest import mock

import pytest
import torch

from bench.head.predict import H100, H200, MODES, Gpu, head_trace, main, predict, seconds
from bench.head.trace import Launch
from dpofast.head.planning import device as head_device
from dpofast.head.planning.plan import HeadPlan, default_logits_bytes

N, D, V = 8192, 4096, 128_256
E_BYTES, DW_BYTES, ROW_BYTES = 2 * N * V, 2 * V * D, 2 * N * D
CHUNKS = 4  # of 2,048 rows
GIB = 1 << 30


@pytest.fixture(scope="module")
def traces():
    return {mode: head_trace(N, D, V, mode, H100) for mode in MODES}


@pytest.fixture(scope="module")
def predictions():
    return {mode: predict(N, D, V, mode, H100) for mode in MODES}


@pytest.mark.parametrize(("mode", "units"), [("forward", 1), ("frozen", 2), ("trained", 3), ("per token", 3)])
def test_products_and_their_rows(traces, mode, units):
    trace = traces[mode]
    assert trace.gemm_units(N, D, V) == units
    logits, hidden, weight = ((N // CHUNKS, D, V), 1 * CHUNKS), ((N, V, D), 1), ((V, N, D), 1)
    assert trace.gemms == dict([logits, hidden, weight][:units])
    assert not any(product.accumulates for product in trace.products)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_pass_reads_a_logit_once_and_writes_e_once(traces, mode):
    name, per_logit = ("_token_logprobs_kernel", 4) if mode == "forward" else ("_exp_rows_kernel", 6)
    passes = traces[mode].named(name)
    assert len(passes) == CHUNKS
    # Beside logits and E: targets, and four results a row.
    assert sum(launch.bytes for launch in passes) == per_logit * N * V + N * (8 + 4 * 4)
    assert not traces[mode].named("_token_logprobs_kernel" if mode != "forward" else "_exp_rows_kernel")


@pytest.mark.parametrize(("mode", "most"), [("forward", 30), ("frozen", 40), ("trained", 60), ("per token", 60)])
def test_few_launches(traces, mode, most):
    assert len(traces[mode].launches) < most


@pytest.mark.parametrize("mode", MODES)
def test_all_but_products_and_row_passes_moves_little(traces, mode):
    """No cast of dW, no multiplication by an upstream gradient of 1, nothing else of its size."""
    rest = [
        x for x in traces[mode].launches if x.gemm is None and "logprobs" not in x.name and "exp_rows" not in x.name
    ]
    assert sum(launch.bytes for launch in rest) < 6 * ROW_BYTES


@pytest.mark.parametrize("mode", ["trained", "per token"])
def test_dw_is_written_once_in_the_heads_dtype(traces, mode):
    (product,) = [launch for launch in traces[mode].products if launch.gemm == (V, N, D)]
    assert product.bytes == E_BYTES + ROW_BYTES + DW_BYTES
    # E and dW, c ⊙ h, dh and vectors: no float32 dW, and no logits any more.
    assert traces[mode].peak_bytes == pytest.approx(E_BYTES + DW_BYTES + 2 * ROW_BYTES, rel=1e-3)


def test_peak_bytes_without_dw(traces):
    logits = 4 * (N // CHUNKS) * V
    assert traces["forward"].peak_bytes == pytest.approx(logits, rel=1e-3)
    assert traces["frozen"].peak_bytes == pytest.approx(logits + E_BYTES + ROW_BYTES, rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "most"), [("forward", 1.21), ("frozen", 1.14), ("trained", 1.10), ("per token", 1.10)]
)
def test_predicted_times_over_the_bare_products(predictions, mode, most):
    assert 1.0 < predictions[mode].ratio <= most


def test_no_plan_waits_for_the_device(traces):
    for trace in traces.values():
        assert not {"_local_scalar_dense", "nonzero", "item"} & {launch.name for launch in trace.launches}


# The launches of a plan with chunks of 512 rows whose dW is added up in float32 over four flushes; in ms, what they
# take when it is calculated by hand.
BEFORE = {
    "logits": ([Launch("mm", N * V // 4 + DW_BYTES, (512, D, V))] * 16, 11.6, 11.8),
    "row passes": ([Launch("rows", 6 * N * V // 16)] * 16, 2.3, 2.4),
    "E·W": ([Launch("mm", E_BYTES // 16 + DW_BYTES, (512, V, D))] * 16, 11.6, 12.9),
    "dW": (
        [
            Launch("mm", E_BYTES // 4 + 2 * DW_BYTES, (V, 2048, D)),
            *[Launch("addmm", E_BYTES // 4 + 2 * DW_BYTES, (V, 2048, D), accumulates=True)] * 3,
        ],
        12.0,
        14.7,
    ),
    "cast and upstream gradient": ([Launch("cast", 3 * DW_BYTES), Launch("mul", 2 * DW_BYTES)], 1.9, 2.1),
}


@pytest.mark.parametrize("part", BEFORE)
def test_the_model_of_time_on_a_plan_that_was_calculated_by_hand(part):
    launches, least, most = BEFORE[part]
    assert least <= 1e3 * sum(seconds(launch, H100) for launch in launches) <= most


def head(rows, budget=None, *, vocab=V, width=D, gpu=H100, dtype=torch.bfloat16, **options):
    meta = head_device.HeadDevice("cuda", gpu.multiprocessors, gpu.memory_bytes)
    with mock.patch.object(head_device, "META", meta):
        weight = torch.empty(vocab, width, dtype=dtype, device="meta")
        most = default_logits_bytes(weight.device) if budget is None else budget
        return HeadPlan.make(rows, weight, most, **{"keep": True, **options})


def test_e_is_kept_whole_up_to_the_bytes_of_a_float32_dw():
    """2·N·V bytes of E, and what goes with them, against the budget and 4·V·D."""
    for budget in (GIB // 2, GIB, 4 * GIB):
        limit = (budget + 4 * V * D) // (2 * V)
        kept = [rows for rows in range(1024, 2 * limit, 128) if head(rows, budget).kept_rows == rows]
        assert kept == [*range(1024, kept[-1] + 1, 128)]
        assert 0.7 * limit < kept[-1] <= limit


def test_few_large_flushes_where_e_is_not_kept_whole():
    for rows in (16_384, 32_768, 65_536):
        plan = head(rows, GIB)
        flushes = 1 + -(-(rows - plan.kept_rows) // plan.scratch_rows)
        trace = head_trace(rows, D, V, "per token", H100, max_logits_bytes=GIB)
        added = [product for product in trace.products if product.gemm[2] == D and product.gemm[0] == V]
        assert len(added) == flushes and plan.scratch_rows > 1000
        assert trace.gemm_units(rows, D, V) == 3 + (rows - plan.kept_rows) / rows
        # Neither half nor twice as many rows at a time would be much better.
        cost = {
            step: rows - (plan.kept_rows + plan.scratch_rows - step) + 1200 * (rows - plan.kept_rows) / step
            for step in (plan.scratch_rows // 2, plan.scratch_rows, 2 * plan.scratch_rows)
            if step < plan.kept_rows + plan.scratch_rows
        }
        assert cost[plan.scratch_rows] < 1.05 * min(cost.values())


@pytest.mark.parametrize(
    ("gpu", "vocab", "width", "rows"),
    [
        (H100, V, D, 2048),
        (H200, V, D, 2048),
        (H100, 32_000, D, 8192),
        (H100, 262_144, 2048, 1024),
        (H100, V, 512, 4096),
    ],
    ids=str,
)
def test_chunks_fill_the_multiprocessors(gpu, vocab, width, rows):
    assert head(1 << 16, 64 * GIB, vocab=vocab, width=width, gpu=gpu).chunk_rows == rows
    tiles = rows // 128 * -(-vocab // 256)
    assert -(-tiles // gpu.multiprocessors) * gpu.multiprocessors / tiles < 1.02


def test_a_small_gpu_has_a_small_default():
    small = Gpu("L4", 58, 24 * 10**9, 1.0, 1.0)
    assert sum(buffer.bytes for buffer in head(N, gpu=small, keep=False).buffers) <= GIB
    assert GIB < sum(buffer.bytes for buffer in head(N, gpu=H100, keep=False).buffers) <= 4 * GIB


@pytest.mark.parametrize("budget", [GIB // 4, GIB, None])
@pytest.mark.parametrize("rows", [4096, 20_480])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_stay_inside_the_budget(mode, rows, budget):
    trace = head_trace(rows, D, V, mode, H100, max_logits_bytes=budget)
    allowed = (4 * GIB if budget is None else budget) + 64 * rows + (mode == "frozen") * 2 * rows * D
    if mode in ("trained", "per token"):
        # In place of E: a float32 dW, and beside it the dW and dh that are returned.
        allowed += 4 * V * D + 2 * V * D + 2 * rows * D
    assert trace.peak_bytes <= allowed


@pytest.mark.parametrize("mode", MODES)
def test_pairs_do_no_product_again_at_any_budget(mode):
    trace = head_trace(20_480, D, V, mode, H100, max_logits_bytes=GIB // 2)
    if mode != "per token":
        assert trace.gemm_units(20_480, D, V) == MODES[mode]


@pytest.mark.parametrize("n", [2, 7, 33, 8191])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_targets_is_traced(mode, n):
    trace = head_trace(n, 33, 101, mode, H100)
    assert trace.gemm_units(n, 33, 101) == MODES[mode]


def test_the_command(capsys):
    assert main(["--n", "7", "--d", "33", "--v", "101"]) == 0
    shown, *lines = capsys.readouterr().out.splitlines()
    assert shown == "PREDICTED, nothing ran on a GPU: N 7, D 33, V 101, bfloat16" and len(lines) == 4 * len(MODES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "expected --n of at least 2, --d and --v of at least 1, got 0, 4096 and 128256"),
        (["--n", "8", "--d", "-3"], "expected --n of at least 2, .* got 8, -3 and 128256"),
        (["--max_logits_bytes", "10"], "max_logits_bytes: expected at least one row of 128256 logits .* got 10"),
    ],
)
def test_what_the_command_refuses(capsys, arguments, message):
    assert main(arguments) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
