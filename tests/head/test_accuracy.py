"""How far linear_logprobs is from float64 on the same 16-bit inputs, in the framework's own error as the unit.

The framework here is what a careful PyTorch model does: logits in float32, their gradient rounded to the model's dtype,
gradients of hidden states and head added up in float32 and rounded to it.
"""

import pytest
import torch

import dpofast
from dpofast import reference
from dpofast.head.engine.interface import HeadInputs, Needs
from dpofast.head.engine.make import make_engine
from dpofast.head.options import LogitOptions

HALVES = (torch.bfloat16, torch.float16)
# Rows whose float64 logits exist at the same time.
CHUNK = 32


def problem(n, vocab, d, dtype, device, scale=3.0):
    """Hidden states, head, targets and an upstream gradient; the logits' standard deviation is `scale`."""
    generator = torch.Generator().manual_seed(n + vocab)
    hidden = torch.randn(n, d, generator=generator).to(device, dtype)
    weight = (torch.randn(vocab, d, generator=generator) * scale / d**0.5).to(device, dtype)
    targets = torch.randint(0, vocab, (n,), generator=generator).to(device)
    return hidden, weight, targets, torch.randn(n, generator=generator).to(device)


def by_hand(hidden, weight, targets, upstream, wide, rounded=None):
    """logps, dh and dW with everything in `wide`; the logits' gradient and the results rounded where asked for."""
    logps, dh = [], []
    head = weight.to(wide)
    dw = torch.zeros_like(head)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        x = hidden[rows].to(wide)
        z = (x @ head.t()).requires_grad_()
        logps.append(reference.logprobs(z, targets[rows]))
        (dz,) = torch.autograd.grad(logps[-1], z, upstream[rows].to(wide))
        dz = dz if rounded is None else dz.to(rounded).to(wide)
        dh.append(dz @ head)
        dw.addmm_(dz.t(), x)
    results = (torch.cat([part.detach() for part in logps]), torch.cat(dh), dw) if logps else (upstream, hidden, dw)
    return results if rounded is None else (results[0], results[1].to(rounded), results[2].to(rounded))


def engine(hidden, weight, targets, upstream, **options):
    """The same by linear_logprobs: dh of the frozen plan, dh and dW of the trained one."""
    frozen, h, w = (x.clone().requires_grad_() for x in (hidden, hidden, weight))
    dpofast.linear_logprobs(frozen, weight, targets, **options).logps.backward(upstream)
    output = dpofast.linear_logprobs(h, w, targets, **options).logps
    output.backward(upstream)
    return output.detach(), frozen.grad, h.grad, w.grad


def errors(value, exact):
    """Relative errors: of the whole in the Frobenius norm, and of the worst element against the largest."""
    assert value.isfinite().all()
    difference = value.double() - exact
    norm, largest = exact.norm().clamp_min(1e-30), exact.abs().max().clamp_min(1e-30)
    return float(difference.norm() / norm), float(difference.abs().max() / largest)


def assert_gradients(inputs, **options):
    """Each gradient's error is at most twice the framework's; its worst element may have one rounding more."""
    dtype = inputs[0].dtype
    exact = by_hand(*inputs, torch.float64)
    framework = by_hand(*inputs, torch.float32, rounded=dtype)
    logps, frozen, dh, dw = engine(*inputs, **options)
    for name, value, true, own in (
        ("dh, frozen head", frozen, exact[1], framework[1]),
        ("dh", dh, exact[1], framework[1]),
        ("dW", dw, exact[2], framework[2]),
    ):
        assert value.dtype == dtype
        (norm, worst), (own_norm, own_worst) = errors(value, true), errors(own, true)
        assert norm <= 2 * own_norm + 1e-6, f"{name}: error {norm:.3g}, the framework's {own_norm:.3g}"
        rounding = torch.finfo(dtype).eps / 2
        assert worst <= 2 * own_worst + rounding, f"{name}: worst {worst:.3g}, the framework's {own_worst:.3g}"
    return logps, exact[0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("n", "vocab", "d"),
    [
        (1, 50_257, 8),
        (127, 7, 16),
        (127, 1000, 64),
        (4097, 7, 16),
        (256, 50_257, 16),
        pytest.param(256, 152_064, 8, marks=pytest.mark.slow(6)),
        pytest.param(64, 262_144, 8, marks=pytest.mark.slow(4)),
    ],
)
def test_gradients_and_sums(n, vocab, d, dtype, device):
    logps, exact = assert_gradients(problem(n, vocab, d, dtype, device))
    # A sum over at most 256 tokens.
    assert (logps[:256].double().sum() - exact[:256].sum()).abs() < 1e-3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 127])
def test_a_vocabulary_of_one_has_nothing_to_learn(n, dtype, device):
    inputs = problem(n, 1, 16, dtype, device)
    for value in engine(*inputs):
        assert not value.any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_no_rows(dtype, device):
    logps, frozen, dh, dw = engine(*problem(0, 50_257, 8, dtype, device))
    assert logps.shape == (0,) and frozen.shape == dh.shape == (0, 8)
    assert dw.shape == (50_257, 8) and not dw.any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_that_are_recomputed_are_as_exact(dtype, device):
    inputs = problem(300, 1000, 32, dtype, device)
    assert_gradients(inputs, max_logits_bytes=60 * 1000 * 6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("vocab", [7, 50_257])
def test_logits_near_ten_thousand(vocab, dtype, device):
    """Rows that are all but one-hot: the target is the row's maximum, or its minimum at −1e4."""
    hidden, weight, targets, upstream = problem(40, vocab, 16, dtype, device, scale=1.0)
    z = hidden.float() @ weight.float().t()
    targets[::2], targets[1::2] = z.argmax(1)[::2], z.argmin(1)[1::2]
    hidden = (hidden.float() * (1e4 / z.abs().amax(1, keepdim=True))).to(dtype)
    logps, exact = assert_gradients((hidden, weight, targets, upstream))
    assert exact.min() < -1.2e4
    framework = by_hand(hidden, weight, targets, upstream, torch.float32)[0]
    # Two spacings of a float32 near 2e4, what the result itself is rounded to.
    floor = 2 * 2.0**-9
    assert (logps - exact).abs().max() <= 2 * (framework - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_flat_rows_of_a_large_vocabulary_with_small_coefficients(dtype, device):
    """S = V = 262,144 and g = 1e-3, as of a loss over 64 pairs: E passes float16's range, and 1/S its least number."""
    n, vocab, d = 16, 262_144, 8
    hidden, weight, targets, _ = problem(n, vocab, d, dtype, device, scale=1e-3)
    weight[targets] += 1.0
    upstream = torch.full((n,), 1e-3, device=device)
    hidden.mul_(1e-3)
    assert_gradients((hidden, weight, targets, upstream))


def kernel_gradients(hidden, weight, targets, upstream, blocks):
    """dh and dW (in float32 before it is rounded) of whole rows of E in the model's dtype, as a GPU computes them."""
    needs, rows = Needs(True, True, False), len(targets) // blocks
    inputs = HeadInputs(hidden, weight, None, targets, LogitOptions())
    engine = make_engine(inputs, "triton", 1 << 40, needs=Needs(True, True, True))
    gradients = engine.gradients(needs)
    for start in range(0, len(targets), rows):
        here, kept = slice(start, start + rows), engine.new_kept()
        (result,) = engine.keep(kept, here)
        assert kept.exp.dtype == hidden.dtype
        gradients.add(here, upstream[here] * result.sums.rescale, result.sums, kept)
    wide = gradients.dw / gradients.product_scale.factor
    dh, dw, _ = gradients.finish()
    return dh, dw, wide


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(
    ("vocab", "scale", "size"), [(1000, 3.0, 1e4), (1000, 3.0, 1e-7), (50_257, 1.0, 1e-3), (262_144, 1e-3, 1e-3)]
)
def test_float16_products_lose_nothing_to_the_size_of_the_gradient(vocab, scale, size, blocks, device):
    """Flat rows and peaked ones, coefficients from 1e-7 to 1e4, which differ a hundredfold from block to block."""
    hidden, weight, targets, upstream = problem(16, vocab, 16, torch.float16, device, scale=scale)
    upstream *= size
    upstream[:4] *= 1e-2
    targets[5], hidden[5] = -100, torch.nan
    dh, dw, wide = kernel_gradients(hidden, weight, targets, upstream, blocks)
    hidden, targets, upstream = hidden.nan_to_num(0.0), targets.clamp_min(0), upstream.clone()
    upstream[5] = 0.0
    _, exact_dh, exact_dw = by_hand(hidden, weight, targets, upstream, torch.float64)
    # 2⁻¹¹ is one rounding to float16; below its least normal number 2⁻¹⁴ a result has fewer bits, wherever it was made.
    for value, exact in ((dh, exact_dh), (dw, exact_dw)):
        assert ((value.double() - exact).abs() <= 3 * 2.0**-11 * exact.abs().max() + 2.0**-24).all()
    assert errors(wide, exact_dw)[0] <= 2.0**-10
    others = torch.ones(vocab, dtype=torch.bool, device=device)
    others[targets] = False
    assert errors(wide[others], exact_dw[others])[0] <= 2.0**-10
