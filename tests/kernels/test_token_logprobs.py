"""kernels/token_logprobs.py against float64: on the GPU where there is one, in Triton's interpreter elsewhere."""

import math

import pytest
import torch

from dpofast.kernels.exp_rows import exp_rows
from dpofast.kernels.row_parts import STATS, empty_result
from dpofast.kernels.token_logprobs import token_logprobs, token_logprobs_grad
from tests.support.close import assert_same
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


def kernel(logits, targets, upstream, out_dtype=torch.float32, **options):
    """Every output of both kernels for the same rows."""
    exp_out = torch.empty(logits.shape, dtype=out_dtype, device=logits.device)
    result = token_logprobs(logits, targets, stats=STATS, exp_out=exp_out, **options)
    grad = token_logprobs_grad(
        logits, targets, result.row_max, result.sum_exp, upstream, out=torch.empty_like(exp_out), **options
    )
    scalars = {"logps": result.logps, "row_max": result.row_max, "sum_exp": result.sum_exp}
    return {**scalars, "exp": exp_out, "grad": grad, **result.stats}


@pytest.mark.parametrize(
    ("n", "v", "options"),
    [
        *((n, v, options) for n, v in ((3, 1), (1, 7), (4, 1000), (3, 4096)) for options in OPTIONS),
        (2, 50_257, "plain"),
        (2, 50_257, "all"),
    ],
)
def test_every_output_is_as_exact_as_torch(n, v, options, device):
    logits, targets, upstream = rows(n, v, device)
    options = make_bias(OPTIONS[options], v, device)
    exact, framework = (truth(logits, targets, upstream, dtype, **options) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_torch(kernel(logits, targets, upstream, **options), exact, framework)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sixteen_bit_rows_are_computed_in_float32_and_rounded_once(dtype, out_dtype, device):
    logits, targets, upstream = rows(3, 2100, device, dtype)
    # Above every other logit, so that the target's entries of E and dx are of the order of the others' sum.
    targets[0] = logits[0].argmax()
    options = make_bias(OPTIONS["all"], 2100, device)
    wide = kernel(logits.float(), targets, upstream, **options)
    got = kernel(logits, targets, upstream, out_dtype, **options)
    if out_dtype == torch.float16:  # scaled, so that 2¹² ≤ S < 2¹³
        wide["exp"] *= torch.exp2(12 - wide["sum_exp"].log2().floor())[:, None]
    for name in ("exp", "grad"):
        value = got.pop(name)
        assert value.dtype == out_dtype
        slack = store_error(out_dtype, device) * wide[name].abs() + torch.finfo(out_dtype).smallest_normal * 2**-10
        assert ((value.float() - wide[name]).abs() <= slack).all(), name
    for name, value in got.items():
        assert_same(value, wide[name], name)


def test_a_confident_target_keeps_its_gradient_in_sixteen_bits(device):
    # p = 1 − 2e-5 is 1 in bfloat16, and p − 1 would be 0.
    logits = torch.zeros(1, 3, device=device)
    logits[0, 1] = 11.5
    targets, upstream = torch.tensor([1], device=device), torch.ones(1, device=device)
    exact = truth(logits, targets, upstream, torch.float64)
    got = kernel(logits, targets, upstream, torch.bfloat16)
    for name in ("exp", "grad"):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place_equals_out_of_place(dtype, device):
    logits, targets, upstream = rows(3, 5000, device, dtype)
    apart = torch.empty_like(logits)
    expected = token_logprobs(logits, targets, softcap=20.0, exp_out=apart)
    tile = logits.clone()
    assert torch.equal(token_logprobs(tile, targets, softcap=20.0, exp_out=tile).logps, expected.logps)
    assert torch.equal(tile, apart)
    sums = (expected.row_max, expected.sum_exp)
    token_logprobs_grad(logits, targets, *sums, upstream, out=apart, softcap=20.0)
    tile = logits.clone()
    assert token_logprobs_grad(tile, targets, *sums, upstream, out=tile, softcap=20.0) is tile
    assert torch.equal(tile, apart)


def test_any_strides(device):
    n, v = 3, 2500
    logits, targets, upstream = rows(n, v, device)
    plain = kernel(logits, targets, upstream)
    column_major = logits.t().contiguous().t()
    padded = torch.full((n, v + 13), math.nan, device=device)[:, 5 : v + 5].copy_(logits)
    every_other = torch.full((2 * n, 2 * v), math.nan, device=device)[::2, 1::2].copy_(logits)
    strided_targets = torch.stack([targets, targets + 1], 1)[:, 0]
    for view in (column_major, padded, every_other):
        assert view.stride() != logits.stride()
        for name, value in kernel(view, strided_targets, upstream).items():
            assert_same(value, plain[name], name)
        in_place = view.clone(memory_format=torch.preserve_format)
        token_logprobs(in_place, targets, exp_out=in_place)
        assert_same(in_place, plain["exp"])
    # What autograd hands to backward after .sum(): one value with stride 0.
    ones = torch.ones(1, device=device).expand(n)
    grad = token_logprobs_grad(
        logits, targets, plain["row_max"], plain["sum_exp"], ones, out=torch.empty_like(column_major)
    )
    torch.testing.assert_close(grad, truth(logits, targets, ones, torch.float32)["grad"])


def test_a_row_does_not_depend_on_the_others(device):
    logits, targets, upstream = rows(12, 3000, device)
    together = kernel(logits, targets, upstream)
    # Rows 0, 4 and 8 begin at multiples of 16 bytes in every tensor, so that the same program computes them.
    for row in (0, 4, 8):
        alone = kernel(logits[row : row + 1], targets[row : row + 1], upstream[row : row + 1])
        for name, value in alone.items():
            assert torch.equal(value[0], together[name][row]), name


def test_empty_batch(device):
    logits, targets = torch.empty(0, 9, device=device), torch.empty(0, dtype=torch.int64, device=device)
    for name, value in kernel(logits, targets, torch.empty(0, device=device)).items():
        assert value.shape == ((0, 9) if name in ("exp", "grad") else (0,))
        assert value.dtype == (torch.bool if name == "is_top1" else torch.float32)


@pytest.mark.parametrize("scales", [{}, {"softcap": 30.0}, {"temperature": 1e-2}], ids=str)
def test_extreme_logits(scales, device):
    logits, targets, upstream = extreme_rows(device)
    exact, framework = (truth(logits, targets, upstream, dtype, **scales) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_torch(kernel(logits, targets, upstream, **scales), exact, framework)


def test_a_row_of_the_lowest_floats_is_uniform(device):
    logits = torch.full((1, 2500), torch.finfo(torch.float32).min, device=device)
    result = token_logprobs(logits, torch.tensor([9], device=device), stats=("entropy", "is_top1"))
    assert result.row_max == logits[0, 0] and result.sum_exp == 2500
    torch.testing.assert_close(result.stats["entropy"].item(), math.log(2500))
    torch.testing.assert_close(result.logps.item(), -math.log(2500))


def test_masked_vocabulary(device):
    logits, targets, upstream = rows(3, 3000, device)
    logits[:, ::3] = -math.inf
    logits[2, 1:] = -math.inf
    logits[2, 0] = 1.0
    targets[0], targets[2] = 1, 0
    exact, framework = (truth(logits, targets, upstream, dtype) for dtype in (torch.float64, torch.float32))
    got = kernel(logits, targets, upstream)
    assert (got.pop("mean_logits")[[0, 2]] == -math.inf).all()
    del exact["mean_logits"], framework["mean_logits"]
    assert_as_good_as_torch(got, exact, framework)
    assert got["logps"][2] == 0 and got["entropy"][2] == 0 and (got["grad"][2] == 0).all()

    targets[0] = 3
    got = kernel(logits, targets, upstream)
    assert got["logps"][0] == -math.inf and not got["is_top1"][0]
    torch.testing.assert_close(got["grad"][0], truth(logits, targets, upstream, torch.float32)["grad"][0])


@pytest.mark.parametrize("scales", [{}, {"softcap": 30.0}], ids=str)
def test_a_broken_row_is_nan_and_breaks_no_other(scales, device):
    logits, targets, upstream = rows(6, 2500, device)
    whole = kernel(logits, targets, upstream, **scales)
    logits[0, 2400] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    targets[4] = 2500
    targets[5] = -1
    got = kernel(logits, targets, upstream, **scales)
    # Softcap makes ±30 of an infinity; without it the row has no distribution.
    broken = [0, 4, 5] if scales else [0, 2, 3, 4, 5]
    for name in ("logps", "row_max", "exp", "grad"):
        assert got[name][broken].isnan().all(), name
        assert torch.equal(got[name][1], whole[name][1]), name
    assert not got["is_top1"][broken].any()
    if scales:
        exact = truth(logits[2:4], targets[2:4], upstream[2:4], torch.float64, **scales)
        torch.testing.assert_close(got["logps"][2:4].double(), exact["logps"])
        torch.testing.assert_close(got["grad"][2:4].double(), exact["grad"], rtol=1e-5, atol=1e-7)


def test_ignored_rows_are_exactly_zero(device):
    logits, targets, upstream = rows(3, 2500, device)
    logits[1], upstream[1] = math.nan, math.nan
    for name, value in kernel(logits, targets, upstream).items():
        assert (value[1] == (1.0 if name == "sum_exp" else 0.0)).all(), name
    chosen = kernel(logits, torch.full_like(targets, 7), upstream)
    other = token_logprobs(logits, torch.full_like(targets, 7), ignore_index=7)
    assert (other.logps == 0).all() and (chosen["logps"][[0, 2]] != 0).all()


def test_top1_goes_to_the_first_of_equal_maxima(device):
    logits = torch.zeros(3, 2600, device=device)
    logits[:, [5, 2500]] = 2.0
    targets = torch.tensor([5, 2500, 6], device=device)
    assert token_logprobs(logits, targets, stats=["is_top1"]).stats["is_top1"].tolist() == [True, False, False]
    flipped = token_logprobs(logits, targets, stats=["is_top1"], logit_scale=-1.0).stats["is_top1"]
    assert flipped.tolist() == [False, False, False]


def test_only_the_statistics_that_were_asked_for(device):
    logits, targets, _ = rows(2, 50, device)
    assert token_logprobs(logits, targets).stats == {}
    assert list(token_logprobs(logits, targets, stats=("mean_logits", "entropy")).stats) == ["mean_logits", "entropy"]


def both_kernels(device):
    """token_logprobs and exp_rows of the same rows, as functions of what they write to."""
    logits, targets, _ = rows(5, 700, device)
    options = {"logit_scale": 1.3, "temperature": 0.7, "softcap": 9.0, "stats": ("entropy", "is_top1")}
    exp_out = torch.empty_like(logits)
    return targets, (
        lambda part, out: token_logprobs(logits[part], targets[part], out=out, **options),
        lambda part, out: exp_rows(logits[part], targets[part], exp_out=exp_out[part], out=out, **options),
    )


def test_rescale_is_the_coefficient_for_a_gradient_of_one(device):
    targets, functions = both_kernels(device)
    for function in functions:
        result = function(slice(None), None)
        expected = (-(1.3 / 0.7) / result.sum_exp).masked_fill(targets == IGNORED, 0.0)
        torch.testing.assert_close(result.rescale, expected, rtol=1e-6, atol=0)
        assert (result.rescale == 0).tolist() == (targets == IGNORED).tolist()


def test_results_are_written_where_they_are_wanted(device):
    targets, functions = both_kernels(device)
    for function in functions:
        expected = function(slice(None), None)
        out = empty_result(5, ("entropy", "is_top1"), targets)
        for part in (slice(0, 4), slice(4, 5)):
            function(part, out.part(part))
        for ours, theirs in zip(out[:-1], expected[:-1], strict=True):
            assert_same(ours, theirs)
        for name, values in expected.stats.items():
            assert_same(out.stats[name], values, name)
        for wrong in (empty_result(4, ("entropy", "is_top1"), targets), empty_result(5, (), targets)):
            with pytest.raises(ValueError, match=r"out: expected results of 5 rows with statistics \['entropy', "):
                function(slice(None), wrong)


def test_float16_holds_e_of_any_vocabulary_behind_a_power_of_two_a_row(device):
    """Flat rows, where e_y − S is −69,999 and 1/S small; peaked ones; one in between; an ignored and a broken one."""
    logits = torch.randn(6, 70_000, device=device)
    logits[0], logits[1, 4], logits[4, 9] = 0.0, 30.0, math.nan
    targets = torch.tensor([3, 4, 5, IGNORED, 7, 8], device=device)
    logits[5, 8] = -1e4
    exact = truth(logits, targets, torch.ones(6, device=device), torch.float64, temperature=2.0)
    tile = torch.empty(6, 70_000, dtype=torch.float16, device=device)
    result = token_logprobs(logits, targets, exp_out=tile, temperature=2.0)
    assert not tile[3].any() and tile[4].isnan().all() and result.rescale[3] == 0
    whole = [0, 1, 2, 5]
    unit = -0.5 / (result.rescale.double() * exact["sum_exp"])[whole]
    torch.testing.assert_close(unit.log2(), unit.log2().round(), atol=1e-5, rtol=0)
    assert ((unit * exact["sum_exp"][whole]).log2().floor() == 12).all()
    gradient = -2 * result.rescale[whole].double()[:, None] * tile[whole].double()
    true = exact["exp"][whole] / exact["sum_exp"][whole, None]
    assert ((gradient - true).abs() <= 2.0**-11 * true.abs() + 2.0**-36).all()


@pytest.mark.gpu(twin="test_in_place_equals_out_of_place")  # the interpreter runs programs one after the other
def test_many_large_rows_in_place_do_not_race(device):
    logits, targets, upstream = rows(512, 151_936, device, torch.bfloat16)
    exp, grad = torch.empty_like(logits), torch.empty_like(logits)
    apart = token_logprobs(logits, targets, exp_out=exp)
    sums = (apart.row_max, apart.sum_exp)
    token_logprobs_grad(logits, targets, *sums, upstream, out=grad)
    for _ in range(5):
        tile = logits.clone()
        assert torch.equal(token_logprobs(tile, targets, exp_out=tile).logps, apart.logps)
        assert torch.equal(tile, exp)
        tile = logits.clone()
        token_logprobs_grad(tile, targets, *sums, upstream, out=tile)
        assert torch.equal(tile, grad)


def test_offsets_beyond_32_bits(device, tmp_path):
    # Row 2 begins 2**31 elements in. A sparse file holds the few pages that are touched.
    v, stride = 40, 2**30
    size = 2 * stride + v
    if device.type == "cpu":
        storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=size, dtype=torch.float16)
    else:
        storage = torch.empty(size, dtype=torch.float16, device=device)
    far = storage.as_strided((3, v), (stride, 1))
    logits, targets, upstream = rows(3, v, device, torch.float16)
    near = kernel(logits, targets, upstream, torch.float16)
    far.copy_(logits)
    result = token_logprobs(far, targets, exp_out=far)
    assert_same(result.logps, near["logps"])
    assert_same(far, near["exp"])
    far.copy_(logits)
    token_logprobs_grad(far, targets, result.row_max, result.sum_exp, upstream, out=far)
    assert_same(far, near["grad"])


GOOD = {"logits": torch.zeros(2, 5), "targets": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5)}, r"logits: expected \(N, V\) with V >= 1 .* got \(5,\) torch.float32"),
        ({"logits": torch.zeros(2, 0)}, r"logits: .* got \(2, 0\)"),
        ({"logits": torch.zeros(2, 5).double()}, r"logits: .* torch.float64; .*reference"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: expected \(2,\) int64 .* got \(3,\) torch.int64"),
        ({"targets": torch.zeros(2)}, r"targets: expected \(2,\) int64 .* got \(2,\) torch.float32"),
        ({"bias": torch.zeros(4)}, r"bias: expected \(5,\) float32 or bfloat16 or float16 .* got \(4,\)"),
        ({"temperature": 0.0}, r"temperature: expected a finite number above 0, got 0.0"),
        ({"softcap": -1.0}, r"softcap: expected a finite number above 0, got -1.0"),
        ({"logit_scale": math.inf}, r"logit_scale: expected a finite number, got inf"),
        ({"stats": ("entropy", "top1")}, r"stats: expected names among entropy, .* got 'top1'"),
        ({"exp_out": torch.zeros(2, 4)}, r"exp_out: expected \(2, 5\) .* got \(2, 4\)"),
        ({"exp_out": torch.zeros(2, 5).double()}, r"exp_out: .* got \(2, 5\) torch.float64"),
        ({"exp_out": torch.zeros(2, 5, device="meta")}, r"exp_out: .* on cpu to match .* on meta"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_max": torch.zeros(3)}, r"row_max: expected \(2,\) float32"),
        ({"sum_exp": torch.zeros(2).half()}, r"sum_exp: expected \(2,\) float32 .* torch.float16"),
        ({"grad_logps": torch.zeros(())}, r"grad_logps: expected \(2,\) .* got \(\)"),
        ({"out": torch.zeros(3, 5)}, r"out: expected \(2, 5\) .* got \(3, 5\)"),
        ({"temperature": math.nan}, r"temperature: expected a finite number above 0, got nan"),
    ],
)
def test_bad_gradient_arguments(change, message):
    good = {**GOOD, **dict.fromkeys(("row_max", "sum_exp", "grad_logps"), torch.ones(2)), "out": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=message):
        token_logprobs_grad(**{**good, **change})
