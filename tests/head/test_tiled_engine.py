"""Tiles of the vocabulary against float64 truth: sums that a later tile rescales, targets in any tile, and the plan."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpofast
from bench.cost import Cost
from dpofast import reference
from dpofast.head.options import STATS, LogitOptions
from dpofast.head.planning import plan as engine_plan
from dpofast.head.planning.plan import TilePlan
from tests.support.close import named
from tests.support.row_cases import FLOATS, head_inputs

NAMES = ("hidden", "weight", "bias")
SOFTCAP = {"softcap": 5.0, "logit_scale": 1.7, "temperature": 0.6}


@pytest.fixture(autouse=True)
def tiles_of_seven(monkeypatch):
    """Many tiles, with few rows in each and at a time."""
    monkeypatch.setattr(engine_plan, "TILE_COLUMNS", 7)
    monkeypatch.setattr(engine_plan, "TILE_ROWS", 5)
    monkeypatch.setattr(engine_plan, "CACHE_BYTES", 3 * 7 * 4)


def gradients(function, tensors, upstream):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    output.backward(upstream.to(output.dtype))
    return output.detach(), [leaf.grad for leaf in leaves]


def check(hidden, weight, bias, targets, upstream, tolerance=1e-5, **options):
    """Compare log-probs, gradients (head trained and frozen, rows kept and recomputed) and statistics with float64's.

    A failure names which of them differs, and at which budget.
    """
    tensors = [tensor for tensor in (hidden, weight, bias) if tensor is not None]

    def exact(h, w, b=None):
        return reference.linear_logprobs(h, w, targets, bias=b, **options)

    truth, true_grads = gradients(exact, [tensor.double() for tensor in tensors], upstream)
    few = 6 * (weight.shape[0] + 8 * weight.shape[1]) * hidden.element_size()
    for budget in (1 << 20, few):

        def ours(h, w=weight, b=bias, budget=budget):
            return dpofast.linear_logprobs(h, w, targets, bias=b, max_logits_bytes=budget, **options).logps

        with torch.no_grad():
            assert_close(ours(hidden), truth, tolerance, name=f"log-probs without gradient in {budget} bytes")
        for head, leaves in (("trained", tensors), ("frozen", [hidden])):
            logps, grads = gradients(ours, leaves, upstream)
            assert_close(logps, truth, tolerance, name=f"log-probs, head {head}, in {budget} bytes")
            for name, value, true in zip(NAMES, grads, true_grads, strict=False):  # frozen: of hidden alone
                assert_close(value, true, tolerance, name=f"gradient of {name}, head {head}, in {budget} bytes")
    z = reference.scaled_logits(torch.nn.functional.linear(*[tensor.double() for tensor in tensors]), **options)
    statistics = dpofast.linear_logprobs(hidden, weight, targets, bias=bias, stats=STATS, **options)
    for name, true in reference.token_statistics(z, targets).items():
        value = getattr(statistics, name)
        if name == "is_top1":
            assert torch.equal(value, true), name
        else:
            assert_close(value, true, tolerance, z, name=name)


def assert_close(value, true, tolerance, like=None, name="value"):
    """Relative to the largest finite number of `like`, which is true's own where nothing else is given."""
    like = true if like is None else like
    finite = like[like.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    actual, expected = value.double() / scale, true / scale
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True, msg=named(name))


@pytest.mark.parametrize("options", [{}, SOFTCAP], ids=["plain", "softcap"])
@pytest.mark.parametrize("vocab", [1, 6, 7, 8, 50])
@pytest.mark.parametrize("n", [0, 1, 13])
def test_any_number_of_tiles(n, vocab, options, device, nan_empty):
    check(*head_inputs(n=n, d=6, vocab=vocab, device=device), **options)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_sixteen_bits_add_up_in_float32(dtype, device):
    inputs = head_inputs(n=13, d=6, vocab=50, dtype=dtype, device=device)
    check(*inputs, tolerance=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("target", [0, 25, 49])
def test_the_maximum_moves_by_more_than_exp_can_hold(order, target, device):
    """From −1e4 to 1e4 over eight tiles: what a tile gave vanishes, and a target in the first one has −2e4 nats."""
    _, _, _, targets, upstream = head_inputs(n=13, vocab=50, device=device)
    weight = torch.linspace(-1.0, 1.0, 50, device=device).unsqueeze(1)
    weight = weight if order == "rising" else weight.flip(0)
    hidden = torch.linspace(1.0, 1e4, 13, device=device).unsqueeze(1)
    targets[:] = target
    check(hidden, weight, None, targets, upstream)


def test_tiles_of_nothing_but_minus_infinity(device):
    """A padded vocabulary's bias: its entries have no probability, wherever they are."""
    hidden, weight, bias, targets, upstream = head_inputs(n=13, d=6, vocab=50, device=device)
    for padding in (slice(0, 14), slice(20, 40), slice(36, 50)):
        padded = bias.clone()
        padded[padding] = -torch.inf
        inside = torch.tensor([15, 16, 17], device=device)[torch.arange(13, device=device) % 3]
        check(hidden, weight, padded, torch.where(targets == -100, targets, inside), upstream)


def test_a_target_without_probability_and_a_row_without_any(device):
    hidden, weight, bias, targets, _ = head_inputs(n=13, d=6, vocab=50, device=device)
    targets[1] = 3
    bias[3] = -torch.inf
    logps = dpofast.linear_logprobs(hidden, weight, targets, bias=bias).logps
    assert logps[1] == -torch.inf and logps[targets != 3].isfinite().all()
    bias[:] = -torch.inf
    logps = dpofast.linear_logprobs(hidden, weight, targets, bias=bias).logps
    assert logps[targets != -100].isnan().all() and (logps[targets == -100] == 0).all()


def test_among_equal_maxima_the_first_is_top1(device):
    hidden, weight = torch.ones(50, 1, device=device), torch.zeros(50, 1, device=device)
    weight[[3, 10, 44]] = 1.0
    is_top1 = dpofast.linear_logprobs(hidden, weight, torch.arange(50, device=device), stats=("is_top1",)).is_top1
    assert is_top1.nonzero().flatten().tolist() == [3]


def test_a_nan_stays_in_its_row(device):
    hidden, weight, bias, targets, upstream = head_inputs(n=13, d=6, vocab=50, device=device)
    clean = hidden.clone()
    hidden[targets == -100] = torch.nan
    hidden[1] = torch.nan
    others = torch.arange(13, device=device) != 1
    for budget in (1 << 20, 6 * 50 * 4):

        def ours(h, w=weight, budget=budget):
            return dpofast.linear_logprobs(h, w, targets, bias=bias, max_logits_bytes=budget).logps

        expected, (dh, dw) = gradients(ours, [clean, weight], upstream)
        for tensors in ([hidden], [hidden, weight]):
            logps, grads = gradients(ours, tensors, upstream)
            assert logps[1].isnan() and grads[0][1].isnan().all()
            torch.testing.assert_close(logps[others], expected[others])
            torch.testing.assert_close(grads[0][others], dh[others])
        assert grads[1].isnan().all() and dw.isfinite().all()


def test_nearly_certain_rows_lose_nothing_to_cancellation(device):
    """At p_y = 1 − 1e-9 float32's 1 − p_y is 0; the sum over the other entries is not."""
    hidden, targets = torch.ones(3, 1, device=device), torch.tensor([0, 20, 49], device=device)
    weight = torch.zeros(50, 1, device=device)
    upstream = torch.ones(3, device=device)
    bias = torch.zeros(50, device=device)
    bias[targets[1]] = 25.0
    weight[20] = 1.0

    def ours(h, w):
        return dpofast.linear_logprobs(h, w, targets[1:2], bias=bias).logps

    def exact(h, w):
        return reference.linear_logprobs(h, w, targets[1:2], bias=bias.double())

    _, grads = gradients(ours, [hidden[1:2], weight], upstream[1:2])
    _, true_grads = gradients(exact, [hidden[1:2].double(), weight.double()], upstream[1:2])
    for value, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(value.double(), true, atol=0, rtol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_a_head_whose_rows_have_a_large_mean(dtype, device):
    """E·W of a tile cancels against the target's row, and was rounded before: still as good as the framework."""
    hidden, weight, _, targets, upstream = head_inputs(n=64, d=32, vocab=2000, device=device)
    hidden, weight = hidden.to(dtype), (weight + 3.0 * torch.randn(32, device=device)).to(dtype)
    tensors = [hidden, weight]
    _, (true, _) = gradients(
        lambda h, w: reference.linear_logprobs(h, w, targets), [tensor.double() for tensor in tensors], upstream
    )
    z = (hidden.float() @ weight.float().t()).requires_grad_()
    (dz,) = torch.autograd.grad(reference.logprobs(z, targets), z, upstream)
    own = dz.to(dtype) @ weight
    _, (frozen,) = gradients(lambda h: dpofast.linear_logprobs(h, weight, targets).logps, tensors[:1], upstream)
    _, (trained, _) = gradients(lambda h, w: dpofast.linear_logprobs(h, w, targets).logps, tensors, upstream)
    for value in (frozen, trained):
        assert (value - true).norm() <= 2 * (own - true).norm() + 1e-6 * true.norm()


def test_gradcheck_over_several_tiles():
    hidden, weight, bias, targets, _ = head_inputs(n=7, d=3, vocab=17, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    for budget in (1 << 20, 5 * 17 * 8):

        def function(h, w, b, budget=budget):
            return dpofast.linear_logprobs(h, w, targets, bias=b, softcap=4.0, max_logits_bytes=budget).logps

        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_row_is_ever_whole(frozen, device):
    """What a call without a trained head needs does not grow with the vocabulary."""
    peaks = []
    for vocab in (70, 700):
        hidden, weight, _, targets, upstream = head_inputs(n=13, d=6, vocab=vocab, device=device)
        with Cost() as cost:
            logps = dpofast.linear_logprobs(hidden.requires_grad_(frozen), weight, targets, backend="torch").logps
            if frozen:
                torch.autograd.grad(logps, hidden, upstream)
        peaks.append(cost.peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.mark.slow(45)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("trains", [False, True])
def test_the_least_budget_suffices(trains, dtype):
    """No row of E is kept, so the whole call is computed again, a row and a few columns at a time."""
    hidden, weight, bias, targets, upstream = head_inputs(n=13, d=6, vocab=50, dtype=dtype)
    options = {"bias": bias, "stats": STATS, **SOFTCAP}
    results = []
    for budget in (1 << 20, 1):
        if budget == 1:
            with pytest.raises(ValueError, match="max_logits_bytes: expected at least one row of 50 logits") as error:
                dpofast.linear_logprobs(hidden, weight.requires_grad_(trains), targets, max_logits_bytes=1, **options)
            budget = int(re.search(r"(\d+) bytes", str(error.value))[1])
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        with Cost() as cost:
            logps = dpofast.linear_logprobs(*leaves, targets, max_logits_bytes=budget, **options).logps
            grads = torch.autograd.grad(logps, leaves[: 1 + trains], upstream)
        results.append((logps.detach(), *grads))
    assert cost.gemm_units(13, 6, 50) == 2 + 2 * trains
    for value, expected in zip(*reversed(results), strict=True):
        assert_close(value, expected.double(), max(1e-5, 2 * torch.finfo(value.dtype).eps))


@settings(max_examples=200)
@given(
    rows=st.integers(0, 5000),
    vocab=st.integers(1, 200_000),
    width=st.integers(1, 8192),
    budget=st.integers(1 << 23, 1 << 30),
    dtype=st.sampled_from(FLOATS),
    keep=st.booleans(),
    largest=st.none() | st.integers(0, 5000),
)
def test_plan_stays_inside_the_budget(rows, vocab, width, budget, dtype, keep, largest):
    largest = None if largest is None else min(largest, rows)
    weight = torch.empty(vocab, width, dtype=dtype, device="meta")
    plan = TilePlan.make(rows, weight, budget, LogitOptions(), keep=keep, largest=largest)
    half = 2 if dtype == torch.bfloat16 else 0
    used = plan.rows * plan.columns * (4 + half) + plan.kept_rows * vocab * (half or 4)
    used += plan.columns * width * 4 * (dtype != torch.float32)
    assert used <= budget
    assert 1 <= plan.columns <= vocab and 1 <= plan.rows <= max(rows, 1) and 0 <= plan.kept_rows <= rows
    assert keep or plan.kept_rows == 0
