"""kernels/exp_rows.py against float64: on the GPU where there is one, in Triton's interpreter elsewhere."""

import math

import pytest
import torch

from dpofast.kernels.exp_rows import LIMIT, exp_rows
from dpofast.kernels.row_parts import STATS
from dpofast.kernels.token_logprobs import token_logprobs, token_logprobs_grad
from tests.support.row_cases import (
    FLOATS,
    IGNORED,
    OPTIONS,
    assert_as_good_as_torch,
    extreme_rows,
    make_bias,
    rows,
    store_error,
    truth,
)

# The interpreter is numpy, which warns about infinities in lanes that a mask or a where discards.
pytestmark = [pytest.mark.usefixtures("nan_empty"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

# Columns of the first tile of a large vocabulary, whose maximum is a part of the guess.
FIRST = 2048


def kernel(logits, targets, upstream, out_dtype=torch.float32, **options):
    """Every output for the same rows, E and S brought to the shift m of the truth, with row_max = m."""
    exp_out = torch.empty(logits.shape, dtype=out_dtype, device=logits.device)
    result = exp_rows(logits, targets, stats=STATS, exp_out=exp_out, **options)
    row_max = token_logprobs(logits, targets, **options).row_max
    assert (((row_max - result.row_max) >= 0) & ((row_max - result.row_max) <= LIMIT.value) | row_max.isnan()).all()
    to_max = torch.exp(result.row_max - row_max).masked_fill(targets == IGNORED, 1.0)
    grad = token_logprobs_grad(
        logits, targets, result.row_max, result.sum_exp, upstream, out=torch.empty_like(exp_out), **options
    )
    return {
        "logps": result.logps,
        "row_max": row_max,
        "sum_exp": result.sum_exp * to_max,
        "exp": exp_out * to_max.unsqueeze(1) if out_dtype == torch.float32 else exp_out,
        "grad": grad,
        **result.stats,
    }


def check(logits, targets, upstream, **options):
    exact, framework = (truth(logits, targets, upstream, dtype, **options) for dtype in (torch.float64, torch.float32))
    got = kernel(logits, targets, upstream, **options)
    assert_as_good_as_torch(got, exact, framework)
    return got


@pytest.mark.parametrize(
    ("n", "v", "options"),
    [
        *((n, v, options) for n, v in ((3, 1), (1, 7), (4, 1000), (3, 4096)) for options in OPTIONS),
        (2, 50_257, "plain"),
        (2, 50_257, "all"),
    ],
)
def test_every_output_is_as_exact_as_torch(n, v, options, device):
    check(*rows(n, v, device), **make_bias(OPTIONS[options], v, device))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("gap", [0.5, 15.9, 16.1, 60.0, 2e4])
def test_a_maximum_beyond_the_first_tile(gap, options, device):
    """Up to 16 nats above the guess the row stays as it is; above, it is done again."""
    logits, targets, upstream = rows(4, 5000, device, scale=0.1)
    targets[0], targets[3] = 7, 4900
    # The target of the last row is the maximum itself, and so the guess is right.
    logits[:, 4900] = gap
    check(logits, targets, upstream, **make_bias(OPTIONS[options], 5000, device))


def test_only_rows_whose_guess_is_wrong_are_done_again(device):
    logits = torch.zeros(4, 5000, device=device)
    targets = torch.tensor([7, 7, 4000, 7], device=device)
    logits[0, 4000], logits[1, 4000], logits[2, 4000] = 16.0, 16.5, 500.0
    result = exp_rows(logits, targets, exp_out=torch.empty_like(logits))
    # The shift tells: c is still the guess, or m.
    assert result.row_max.tolist() == [0.0, 16.5, 500.0, 0.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_e_is_rounded_once(dtype, device):
    logits, targets, upstream = rows(3, 2100, device, dtype)
    targets[0] = logits[0].argmax()
    options = make_bias(OPTIONS["all"], 2100, device)
    wide = kernel(logits.float(), targets, upstream, **options)
    got = kernel(logits, targets, upstream, torch.bfloat16, **options)
    assert torch.equal(got["logps"], wide["logps"])
    # Every maximum is in the first tile here, so E has the shift m.
    slack = store_error(torch.bfloat16, device) * wide["exp"].abs() + torch.finfo(torch.bfloat16).smallest_normal
    assert ((got["exp"].float() - wide["exp"]).abs() <= slack).all()


@pytest.mark.parametrize("gap", [15.0, 40.0])
def test_bfloat16_has_room_for_a_low_guess(gap, device):
    logits = torch.zeros(1, 262_144, device=device)
    logits[:, FIRST:] = gap
    targets = torch.tensor([9], device=device)
    tile = torch.empty(1, 262_144, dtype=torch.bfloat16, device=device)
    result = exp_rows(logits, targets, exp_out=tile)
    exact = torch.log_softmax(logits.double(), 1)[0, 9]
    torch.testing.assert_close(result.logps[0].double(), exact, rtol=0, atol=1e-5)
    p = tile.double() / result.sum_exp.double()
    assert tile.isfinite().all() and p[0, 9].item() == pytest.approx(-1, rel=1e-2)
    assert p[0, -1].item() == pytest.approx(1 / (262_144 - FIRST), rel=1e-2)


def test_a_confident_target_keeps_its_entry_in_sixteen_bits(device):
    logits = torch.zeros(1, 3, device=device)
    logits[0, 1] = 11.5
    tile = torch.empty(1, 3, dtype=torch.bfloat16, device=device)
    exp_rows(logits, torch.tensor([1], device=device), exp_out=tile)
    torch.testing.assert_close(tile[0, 1].item(), -2 * math.exp(-11.5), rtol=1e-2, atol=0)


def test_any_strides(device):
    n, v = 3, 2500
    logits, targets, _ = rows(n, v, device)
    plain = torch.empty_like(logits)
    logps = exp_rows(logits, targets, exp_out=plain).logps
    padded = torch.full((n, v + 13), math.nan, device=device)[:, 5 : v + 5].copy_(logits)
    for view in (logits.t().contiguous().t(), padded):
        out = torch.full((n, 2 * v), math.nan, device=device)[:, ::2]
        assert torch.equal(exp_rows(view, targets, exp_out=out).logps, logps)
        assert torch.equal(out, plain)


def test_empty_batch(device):
    logits, targets = torch.empty(0, 9, device=device), torch.empty(0, dtype=torch.int64, device=device)
    result = exp_rows(logits, targets, exp_out=torch.empty_like(logits), stats=STATS)
    assert result.logps.shape == (0,) and list(result.stats) == list(STATS)


@pytest.mark.parametrize("scales", [{}, {"softcap": 30.0}, {"temperature": 1e-2}], ids=str)
def test_extreme_logits(scales, device):
    logits, targets, upstream = extreme_rows(device)
    check(logits, targets, upstream, **scales)


def test_a_row_of_the_lowest_floats_is_uniform(device):
    logits = torch.full((1, 2500), torch.finfo(torch.float32).min, device=device)
    result = exp_rows(logits, torch.tensor([9], device=device), exp_out=torch.empty_like(logits), stats=["entropy"])
    torch.testing.assert_close(result.stats["entropy"].item(), math.log(2500))
    torch.testing.assert_close(result.logps.item(), -math.log(2500))


def test_masked_vocabulary(device):
    logits, targets, upstream = rows(4, 3000, device)
    logits[:, ::3] = -math.inf
    logits[2, 1:] = -math.inf
    logits[2, 0] = 1.0
    # Nothing but −inf in the first tile, so the guess is the lowest float.
    logits[3, :FIRST] = -math.inf
    targets[0], targets[2], targets[3] = 1, 0, 2998
    exact, framework = (truth(logits, targets, upstream, dtype) for dtype in (torch.float64, torch.float32))
    got = kernel(logits, targets, upstream)
    for values in (got, exact, framework):
        del values["mean_logits"]
    assert_as_good_as_torch(got, exact, framework)
    targets[0], targets[3] = 3, 5
    got = kernel(logits, targets, upstream)
    assert (got["logps"][[0, 3]] == -math.inf).all() and not got["is_top1"][[0, 3]].any()
    torch.testing.assert_close(got["grad"][[0, 3]], truth(logits, targets, upstream, torch.float32)["grad"][[0, 3]])


@pytest.mark.parametrize("scales", [{}, {"softcap": 30.0}], ids=str)
def test_a_broken_row_is_nan_and_breaks_no_other(scales, device):
    logits, targets, upstream = rows(7, 2500, device)
    whole = kernel(logits, targets, upstream, **scales)
    logits[0, 2400] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    targets[4], targets[5] = 2500, -1
    logits[6, 2400] = math.inf
    got = kernel(logits, targets, upstream, **scales)
    # Softcap makes ±30 of an infinity; without it the row has no distribution.
    broken = [0, 4, 5] if scales else [0, 2, 3, 4, 5, 6]
    for name in ("logps", "exp", "grad"):
        assert got[name][broken].isnan().all(), name
        assert torch.equal(got[name][1], whole[name][1]), name
    assert not got["is_top1"][broken].any()


def test_ignored_rows_are_exactly_zero(device):
    logits, targets, upstream = rows(3, 2500, device)
    logits[1], upstream[1] = math.nan, math.nan
    for name, value in kernel(logits, targets, upstream).items():
        assert (value[1] == (1.0 if name == "sum_exp" else 0.0)).all(), name


def test_top1_goes_to_the_first_of_equal_maxima(device):
    logits = torch.zeros(3, 2600, device=device)
    logits[:, [5, 2500]] = 2.0
    targets = torch.tensor([5, 2500, 6], device=device)
    result = exp_rows(logits, targets, exp_out=torch.empty_like(logits), stats=["is_top1"])
    assert result.stats["is_top1"].tolist() == [True, False, False]


@pytest.mark.gpu(twin="test_every_output_is_as_exact_as_torch")
def test_many_large_rows_do_not_race(device):
    logits, targets, upstream = rows(512, 151_936, device)
    logits[::3, 100_000] = 80.0
    expected = token_logprobs_grad(
        logits,
        targets,
        *exp_rows(logits, targets, exp_out=torch.empty_like(logits))[1:3],
        torch.full_like(upstream, -1.0),
        out=torch.empty_like(logits),
    )
    for _ in range(5):
        tile = torch.empty_like(logits, dtype=torch.bfloat16)
        sums = exp_rows(logits, targets, exp_out=tile).sum_exp
        torch.testing.assert_close(tile / sums.unsqueeze(1), expected, rtol=1e-2, atol=1e-6)


GOOD = {
    "logits": torch.zeros(2, 5),
    "targets": torch.zeros(2, dtype=torch.int64),
    "exp_out": torch.zeros(2, 5),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5)}, r"logits: expected \(N, V\) with V >= 1 .* got \(5,\) torch.float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: expected \(2,\) int64 .* got \(3,\) torch.int64"),
        ({"bias": torch.zeros(4)}, r"bias: expected \(5,\) float32 or bfloat16 or float16 .* got \(4,\)"),
        ({"softcap": -1.0}, r"softcap: expected a finite number above 0, got -1.0"),
        ({"stats": ("top1",)}, r"stats: expected names among entropy, .* got 'top1'"),
        ({"exp_out": torch.zeros(2, 4)}, r"exp_out: expected \(2, 5\) .* got \(2, 4\)"),
        ({"exp_out": torch.zeros(2, 5).half()}, r"exp_out: .* float32 or bfloat16 .* torch.float16"),
        ({"exp_out": GOOD["logits"]}, r"exp_out: expected a storage of its own, got the logits'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        exp_rows(**{**GOOD, **change})
