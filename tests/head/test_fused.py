"""backend="fused": log-probs, gradients and losses of every plan, where one kernel makes E of hidden states."""

import pytest
import torch

import dpofast
from bench.cost import Cost
from bench.head.predict import H100, head_trace, predict
from dpofast import reference
from dpofast.head.linear_logprobs_op import linear_logprobs_op
from tests.support.row_cases import head_inputs

# The interpreter's tl.dot is wrong in bfloat16.
DTYPES = [torch.float32, torch.float16]
OPTIONS = {"plain": {}, "all": {"logit_scale": 1.3, "softcap": 5.0, "temperature": 1.5}}
VOCAB = 301
ROW_BYTES = 4 * VOCAB
# All rows of E at once; a few that are kept, and the others computed again.
BUDGETS = {"all at once": 1 << 30, "computed again": 14 * ROW_BYTES}
NEEDS = {"frozen": (1, 0), "trained": (1, 1), "head alone": (0, 1)}


def gradients(function, tensors, needs, upstream):
    leaves = [tensor.detach().clone().requires_grad_(bool(need)) for tensor, need in zip(tensors, needs, strict=True)]
    output = function(*leaves)
    output.backward(upstream.to(output.dtype))
    return output.detach(), [leaf.grad for leaf in leaves]


def assert_close(ours, truth, own, slack):
    """Error against float64 within twice float32 torch's own, relative to the largest value."""
    size = truth.abs().max().clamp_min(1e-12)
    error, framework = ((value.double() - truth).abs().max() / size for value in (ours, own))
    assert error <= 2 * framework + slack, f"error {error:.2g}, torch's {framework:.2g}"


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_plan_is_as_exact_as_the_framework(dtype, options, budget, needs, device):
    hidden, weight, bias, targets, upstream = head_inputs(n=23, vocab=VOCAB, dtype=dtype, device=device)
    hidden[targets == -100] = float("nan")
    tensors, needed = (hidden, weight, bias), (*NEEDS[needs], NEEDS[needs][1])

    def run(function, dtype):
        clean = hidden.nan_to_num(0.0)
        return gradients(function, [tensor.to(dtype) for tensor in (clean, weight, bias)], needed, upstream)

    def full(h, w, b):
        return reference.linear_logprobs(h, w, targets, bias=b, **OPTIONS[options])

    truth, own = run(full, torch.float64), run(full, torch.float32)
    logps, grads = gradients(
        lambda h, w, b: (
            dpofast.linear_logprobs(
                h, w, targets, bias=b, backend="fused", max_logits_bytes=BUDGETS[budget], **OPTIONS[options]
            ).logps
        ),
        tensors,
        needed,
        upstream,
    )
    assert_close(logps, truth[0], own[0], 1e-6)
    for ours, exact, framework in zip(grads, truth[1], own[1], strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            assert_close(ours, exact, framework.to(dtype), 2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_preference_loss_equals_that_of_the_row_kernels(budget, trains, device):
    hidden, weight, bias, targets, _ = head_inputs(n=40, vocab=VOCAB, device=device)
    cu_targets = torch.tensor([0, 9, 20, 31, 40], dtype=torch.int32)
    pairs, ref_logps = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.tensor([-30.0, -40.0, -35.0, -33.0])
    results = {}
    for backend in ("fused", "triton"):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        output = dpofast.linear_preference_loss(
            *leaves,
            targets,
            cu_targets,
            pairs,
            ref_logps.to(device),
            bias=bias,
            backend=backend,
            max_logits_bytes=BUDGETS[budget] * 2,
        )
        output.loss.backward()
        results[backend] = (output.loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad))
    for ours, expected in zip(results["fused"], results["triton"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-7)


def test_no_logits_and_no_products_of_them_are_in_memory():
    """E is the only matrix of rows by vocabulary: for a frozen head one product is left, for a trained one two."""
    hidden, weight, _, targets, upstream = head_inputs(n=64, d=16, vocab=1024)
    for trains, units in ((False, 1), (True, 2)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        with Cost() as cost:
            dpofast.linear_logprobs(*leaves, targets, backend="fused").logps.backward(upstream)
        assert cost.gemm_units(64, 16, 1024) == units
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert cost.peak_bytes_beyond(*gradients) < 1.1 * 4 * 64 * 1024 + 64 * 600


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 0, 0)])
def test_the_operators_pass_opcheck(budget, needs, device):
    *tensors, targets, _ = head_inputs(n=7, d=4, vocab=11, device=device)
    leaves = [tensor.requires_grad_(bool(need)) for tensor, need in zip(tensors, needs, strict=True)]
    budget = 5 * 44 if budget == "computed again" else BUDGETS[budget]
    arguments = (*leaves, targets, 1.0, 1.0, None, -100, "", "fused", budget, *map(bool, needs))
    torch.library.opcheck(linear_logprobs_op, arguments)


@pytest.mark.parametrize("trains", [False, True])
def test_torch_compile_without_a_graph_break(trains, device):
    *tensors, targets, upstream = head_inputs(n=9, d=8, vocab=33, device=device)
    needs = (1, trains, trains)

    def logps(h, w, b):
        return dpofast.linear_logprobs(h * 2, w, targets, bias=b, backend="fused").logps * 3

    expected, grads = gradients(logps, tensors, needs, upstream)
    compiled, compiled_grads = gradients(
        torch.compile(logps, fullgraph=True, backend="aot_eager"), tensors, needs, upstream
    )
    torch.testing.assert_close(compiled, expected)
    for ours, exact in zip(compiled_grads, grads, strict=True):
        assert (ours is None and exact is None) or torch.equal(ours, exact)


def test_predicted_times_on_an_h100():
    """At 0.93 of cuBLAS's rate: no product of logits is left to torch, and E is written once. Predictions, no times."""
    n, d, v = 8192, 4096, 128_256
    for mode, most, units in (("forward", 1.10, 1), ("frozen", 1.065, 2), ("trained", 1.06, 3), ("per token", 1.06, 3)):
        found = predict(n, d, v, mode, H100, backend="fused")
        assert found.ratio <= most and found.ratio < predict(n, d, v, mode, H100).ratio
        # The guess of every row is the maximum of 512 columns.
        assert found.units == pytest.approx(units + 512 / v) and found.launches < 60
    gemms = head_trace(n, d, v, "trained", H100, backend="fused").named("_exp_gemm_kernel")
    assert [launch.bytes > 2 * n * v for launch in gemms] == [True, False] and gemms[1].bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_e_that_is_computed_again_may_have_another_shift_than_forward(dtype):
    """The row kernel of forward takes the maximum, that of backward a guess, and float16 a power of two."""
    hidden, weight, _, targets, upstream = head_inputs(n=40, d=4, vocab=2400, dtype=torch.float32)
    # The maximum of every row lies about 10 above all that the guess sees.
    hidden[:, 0], weight[:, 0], weight[2300, 0] = 1.0, 0.0, 15.0
    hidden, weight, truth = hidden.to(dtype), weight.to(dtype), {}
    for backend, budget in (("reference", None), ("triton", 20 * 2400 * 4)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = dpofast.linear_logprobs(*leaves, targets, backend=backend, max_logits_bytes=budget).logps
        logps.backward(upstream)
        truth[backend] = [leaf.grad.float() for leaf in leaves]
    for ours, expected in zip(truth["triton"], truth["reference"], strict=True):
        assert (ours - expected).abs().max() <= 2e-2 * expected.abs().max()
