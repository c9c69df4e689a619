"""E of kernels/exp_gemm.py against float64: on the GPU where there is one, in Triton's interpreter elsewhere."""

import math

import pytest
import torch

from dpofast.kernels.exp_gemm import RANGES, SAMPLES, exp_gemm
from dpofast.kernels.linear_tiles import LinearTile
from tests.support.linear_cases import assert_logps_as_good_as_torch, problem, tensor_core_error
from tests.support.row_cases import IGNORED, OPTIONS, make_bias, store_error
from tests.support.row_cases import truth as row_truth

# The interpreter is numpy, which warns about infinities in lanes that a mask or a where discards.
pytestmark = [pytest.mark.usefixtures("nan_empty"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

SMALL = LinearTile(16, 32, 16, num_warps=4, num_stages=2)
# With this vocabulary every second column is sampled for the guess, from 0 on.
V = 2 * SAMPLES + 1
UNSEEN = 7


def empty_rows(hidden, weight, dtype=torch.float32):
    return torch.full((len(hidden), len(weight)), math.nan, dtype=dtype, device=hidden.device)


def run(hidden, weight, targets, dtype=torch.float32, **options):
    """The kernel's results, and its dlogp/dx in float64."""
    exp = empty_rows(hidden, weight, dtype)
    result = exp_gemm(hidden, weight, targets, exp_out=exp, **{"tile": SMALL, **options})
    return result, exp.double() * result.rescale.double()[:, None]


def check(hidden, weight, targets, dtype=torch.float32, **options):
    """Error against float64 within twice float32 torch's own, plus roundings of z and of E's store."""
    result, grad = run(hidden, weight, targets, dtype, **options)
    launch = {name: options.pop(name) for name in ("tile", "splits", "descriptors") if name in options}
    assert_logps_as_good_as_torch(result, hidden, weight, targets, **options)
    exact, framework = (
        unit_gradient(hidden, weight, targets, wide, **options) for wide in (torch.float64, torch.float32)
    )
    z_max = exact["row_max"].abs().max()
    rounding = 2.0**-22 * (z_max + 1) + tensor_core_error(hidden) * z_max + store_error(dtype, hidden.device)
    error, own = (grad - exact["grad"]).abs().max(), (framework["grad"].double() - exact["grad"]).abs().max()
    size = exact["grad"].abs().max()
    assert error <= 2 * own + rounding * size, f"error {error:.3g}, torch's {own:.3g} with {launch}"
    return result, grad


def unit_gradient(hidden, weight, targets, dtype, *, bias=None, **scales):
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype))
    return row_truth(logits, targets, torch.ones(len(hidden), device=hidden.device), dtype, bias=bias, **scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "d", "v"), [(1, 1, 7), (33, 48, 257)])
def test_e_is_as_exact_as_torch(n, d, v, options, dtype, device):
    hidden, weight, targets = problem(n, d, v, device, dtype)
    check(hidden, weight, targets, **make_bias(OPTIONS[options], v, device))


@pytest.mark.parametrize("exp_dtype", RANGES)
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("splits", [1, 3, 40])
def test_every_dtype_of_e_however_it_is_stored(splits, descriptors, exp_dtype, device):
    # Rows of E start 16-byte aligned, so that a descriptor can store them; 40 splits leave most without a column.
    hidden, weight, targets = problem(20, 50, 100, device, torch.float16)
    hidden = torch.zeros(20, 56, dtype=torch.float16, device=device)[:, :50].copy_(hidden)
    weight = torch.zeros(100, 56, dtype=torch.float16, device=device)[:, :50].copy_(weight)
    exp = torch.full((20, 112), math.nan, dtype=exp_dtype, device=device)
    options = {"tile": SMALL, "splits": splits, "descriptors": descriptors}
    result = exp_gemm(hidden, weight, targets, exp_out=exp[:, :100], **options)
    assert exp[:, 100:].isnan().all()
    exact = unit_gradient(hidden, weight, targets, torch.float64)["grad"]
    error = (exp[:, :100].double() * result.rescale.double()[:, None] - exact).abs()
    assert (error <= (store_error(exp_dtype, device) + 1e-5) * exact.abs() + 1e-6).all()
    again = torch.full_like(exp, math.nan)
    same = exp_gemm(hidden, weight, targets, exp_out=again[:, :100], **options)
    assert all(torch.equal(one, other) for one, other in zip(result, same, strict=True))
    assert torch.equal(again[:, :100], exp[:, :100])


def with_gap(gap, device):
    """Rows whose maximum lies gap nats above every column that the guess sees, and bias that makes it so."""
    hidden, weight, targets = problem(20, 40, V, device, scale=0.1)
    targets[targets == UNSEEN] = 8
    bias = torch.zeros(V, device=device)
    bias[UNSEEN] = gap
    return hidden, weight, targets, bias


@pytest.mark.parametrize("exp_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [0.0, 5.0, 30.0, 43.0, 60.0, 2e4])
def test_a_guess_below_the_maximum_costs_no_accuracy(gap, exp_dtype, device):
    """Where S passes 2^64 (float16: 2^13) the row is computed again, with a shift that follows from its lse."""
    hidden, weight, targets, bias = with_gap(gap, device)
    result, _ = check(hidden, weight, targets, exp_dtype, bias=bias, splits=2)
    keep, limits = targets != IGNORED, RANGES[exp_dtype]
    sums = (-1 / result.rescale[keep]).log2()
    assert ((sums >= limits.least) & (sums <= limits.most)).all()
    guessed = limits.again + max(math.log2(V), gap / math.log(2))
    expected = limits.again if guessed > limits.most else guessed
    assert ((sums - expected).abs() < 1.0).all()


def test_the_rows_beside_one_that_is_computed_again_keep_their_bits(device):
    hidden, weight, targets, _ = with_gap(0.0, device)
    hidden[:, 3] = 0.0
    weight[UNSEEN] = 0.0
    weight[UNSEEN, 3] = 100.0
    before, after = empty_rows(hidden, weight), empty_rows(hidden, weight)
    alone = exp_gemm(hidden, weight, targets, exp_out=before, tile=SMALL, splits=2)
    hidden[4, 3] = 3.0  # 300 nats above the rest
    result = exp_gemm(hidden, weight, targets, exp_out=after, tile=SMALL, splits=2)
    others = torch.arange(20, device=device) != 4
    assert result.rescale[4].item() == pytest.approx(-1.0, rel=1e-3)
    for one, other in zip((*alone, before), (*result, after), strict=True):
        assert torch.equal(one[others], other[others]) and not torch.equal(one[4], other[4])
    check(hidden, weight, targets)


@pytest.mark.parametrize("scales", [{}, {"softcap": 30.0}], ids=str)
def test_a_broken_row_is_nan_and_breaks_no_other(scales, device):
    hidden, weight, targets = problem(20, 40, 100, device)
    clean, clean_grad = run(hidden, weight, targets, **scales)
    hidden[5, 7], hidden[6, 7] = math.nan, math.inf
    targets[7], targets[8] = 100, -1
    result, grad = run(hidden, weight, targets, **scales)
    # Softcap makes ±30 of an infinity; without it the row has no distribution.
    broken = [5, 7, 8] if scales else [5, 6, 7, 8]
    others = [row for row in range(20) if row not in (5, 6, 7, 8)]
    assert result.logps[broken].isnan().all() and grad[broken].isnan().all()
    assert torch.equal(result.logps[others], clean.logps[others]) and torch.equal(grad[others], clean_grad[others])
    assert scales == {} or grad[6].isfinite().all()


def test_ignored_rows_are_exactly_zero(device):
    hidden, weight, targets = problem(20, 40, 100, device)
    hidden[1] = math.nan
    result, grad = run(hidden, weight, targets)
    exp = empty_rows(hidden, weight)
    exp_gemm(hidden, weight, targets, exp_out=exp, tile=SMALL)
    assert not exp[1].any() and not grad[1].any() and all(value[1] == 0 for value in result)
    exp = empty_rows(hidden, weight)
    result = exp_gemm(hidden, weight, torch.full_like(targets, IGNORED), exp_out=exp, tile=SMALL)
    assert not exp.any() and not any(value.any() for value in result)


@pytest.mark.parametrize("options", ["plain", "softcap"])
def test_logits_near_1e4(options, device):
    """z · log2(e) − c is rounded once, near 0 where e matters, so what is left is the rounding of z itself."""
    hidden, weight, targets = problem(12, 40, 300, device)
    size = (hidden @ weight.t()).abs().amax(1, keepdim=True)
    hidden *= 1e4 / size
    # Half of the rows have their largest logit as target, the others a second one that is close.
    order = (hidden.double() @ weight.double().t()).argsort(1, descending=True)
    targets[:6] = order[:6, 0]
    weight[order[7, 1]] = weight[order[7, 0]] * (1 - 1e-4)
    targets[7] = order[7, 1]
    result, _ = check(hidden, weight, targets, **OPTIONS[options])
    assert result.lse.abs().max() > (9e3 if options == "plain" else 4)


def test_the_exponent_loses_nothing_beyond_the_rounding_of_the_logit(device):
    # x is exact in float32, so logp's only errors are those of the exponent: 1e4 · 2^-24 = 6e-4 if z · log2(e) were
    # rounded before c is subtracted.
    x = 1e4 + torch.arange(64, device=device) / 64
    weight = torch.stack([x.floor(), x - x.floor()], 1)
    hidden, targets = torch.ones(64, 2, device=device), torch.arange(64, device=device)
    result = exp_gemm(hidden, weight, targets, tile=SMALL)
    exact = torch.log_softmax(x.double(), 0)
    assert (result.logps.double() - exact).abs().max() < 2e-6


def test_masked_words(device):
    hidden, weight, targets = problem(6, 40, V, device)
    bias = torch.zeros(V, device=device)
    # Nothing but −inf in the columns of the guess, and in one target.
    bias[::2] = -math.inf
    targets[2:] = torch.tensor([21, 60, 23, 25])
    result, grad = run(hidden, weight, targets, bias=bias)
    exact = torch.log_softmax(hidden.double() @ weight.double().t() + bias, 1)
    torch.testing.assert_close(
        result.logps[[2, 4, 5]].double(), exact[[2, 4, 5], targets[[2, 4, 5]]], rtol=0, atol=1e-5
    )
    assert result.logps[3] == -math.inf and (grad[3, ::2] == 0).sum() == V // 2
    torch.testing.assert_close(-grad[3, 1::2], exact[3, 1::2].exp(), rtol=0, atol=1e-6)
    nothing, grad = run(hidden, weight, targets, bias=torch.full_like(bias, -math.inf))
    assert nothing.logps[2].isnan() and grad[2].isnan().all()


def test_a_certain_target_has_no_positive_entry(device):
    hidden, weight, targets = problem(20, 100, 40, device, scale=200.0)
    targets = (hidden @ weight.t()).argmax(1)
    exp = empty_rows(hidden, weight)
    result = exp_gemm(hidden, weight, targets, exp_out=exp, tile=SMALL)
    own = exp.gather(1, targets[:, None])
    assert (own <= 0).all() and (result.logps <= 0).all()


def test_no_rows(device):
    hidden, weight, targets = problem(0, 40, 100, device)
    result = exp_gemm(hidden, weight, targets, exp_out=empty_rows(hidden, weight))
    assert [value.shape for value in result] == [(0,)] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_out": torch.zeros(2, 4)}, r"exp_out: expected \(2, 3\) float32 or bfloat16 or float16 .* got \(2, 4\)"),
        ({"exp_out": torch.zeros(2, 3).double()}, r"exp_out: expected \(2, 3\) .* torch.float64"),
        ({"exp_out": torch.zeros(3, 2).t()}, r"exp_out: expected rows with a column stride of 1, got strides \(1, 2\)"),
    ],
)
def test_bad_arguments(change, message):
    good = {"hidden": torch.zeros(2, 5), "weight": torch.zeros(3, 5), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        exp_gemm(**good, **change)


@pytest.mark.gpu(twin="test_every_dtype_of_e_however_it_is_stored")
@pytest.mark.parametrize("descriptors", [None, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n", "d", "v"), [(300, 1024, 151_936), (1, 4096, 50_257), (2500, 576, 49_152), (130, 41, 999)]
)
def test_real_sizes_on_the_gpu(n, d, v, dtype, descriptors, device):
    hidden, weight, targets = problem(n, d, v, device, dtype)
    columns = -(-v // 16) * 16
    exps = [torch.full((n, columns), math.nan, dtype=dtype, device=device)[:, :v] for _ in range(2)]
    results = [exp_gemm(hidden, weight, targets, exp_out=exp, descriptors=descriptors) for exp in exps]
    assert_logps_as_good_as_torch(results[0], hidden, weight, targets)
    assert torch.equal(exps[0], exps[1]) and torch.equal(results[0].rescale, results[1].rescale)
    exact = unit_gradient(hidden[:64], weight, targets[:64], torch.float64)["grad"]
    error = exps[0][:64].double() * results[0].rescale[:64].double()[:, None] - exact
    assert error.abs().max() <= (store_error(dtype, hidden.device) + 1e-4) * exact.abs().max()
