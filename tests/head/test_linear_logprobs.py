"""dpofast.head.linear_logprobs and dpofast.linear_logprobs against float64 truth, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpofast
from bench.cost import Cost
from dpofast import reference
from dpofast.common.backend import choose_backend
from dpofast.head.engine.row_engine import exp_rows_like
from dpofast.head.linear_logprobs_op import linear_logprobs_op
from dpofast.head.planning.plan import HeadPlan, even_chunks, even_rows, total_bytes
from tests.support.row_cases import head_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton", "reference"]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 1.3, "softcap": 5.0, "temperature": 1.5},
]


def gradients(function, tensors, upstream):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    output.backward(upstream.to(output.dtype))
    return output.detach(), [leaf.grad for leaf in leaves]


def relative_error(values, truth):
    scale = truth.abs().max().clamp_min(1e-12)
    return float((values.double() - truth).abs().max() / scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature", "all"])
def test_linear_logprobs_and_gradients_are_as_exact_as_the_framework(backend, dtype, options, device):
    hidden, weight, bias, targets, upstream = head_inputs(dtype=dtype, device=device)
    wide = [tensor.double() for tensor in (hidden, weight, bias)]
    truth, true_grads = gradients(
        lambda h, w, b: reference.linear_logprobs(h, w, targets, bias=b, **options), wide, upstream
    )
    # The framework's own error with float32 logits: upcast, compute, round the gradients to the dtype.
    _, own_grads = gradients(
        lambda h, w, b: reference.linear_logprobs(h.float(), w.float(), targets, bias=b.float(), **options),
        (hidden, weight, bias),
        upstream,
    )
    logps, grads = gradients(
        lambda h, w, b: dpofast.linear_logprobs(h, w, targets, bias=b, backend=backend, **options).logps,
        (hidden, weight, bias),
        upstream,
    )
    assert logps.dtype == torch.float32
    assert relative_error(logps, truth) < 1e-6
    # A 16-bit model's E is rounded once to its dtype, so half a unit in the last place comes on top of the framework's.
    # On a CPU without kernels E of float16 is float32.
    narrow = dtype == torch.bfloat16 or (dtype == torch.float16 and backend != "torch")
    rounding = torch.finfo(dtype).eps if narrow else 1e-6
    if backend != "torch" and device.type == "cpu" and dtype == torch.bfloat16:
        rounding *= 2  # Triton's interpreter truncates E and dh, where a GPU rounds them
    for ours, own, true in zip(grads, own_grads, true_grads, strict=True):
        assert relative_error(ours, true) <= 2 * relative_error(own, true) + rounding


@pytest.mark.parametrize("vocab", [1, 7, 1000, 50257])
@pytest.mark.parametrize("n", [0, 1, 129])
def test_ragged_shapes(vocab, n, device):
    hidden, weight, bias, targets, upstream = head_inputs(n=n, vocab=vocab, d=8, device=device)
    truth, true_grads = gradients(
        lambda h, w, b: reference.linear_logprobs(h, w, targets, bias=b),
        [x.double() for x in (hidden, weight, bias)],
        upstream,
    )
    logps, grads = gradients(
        lambda h, w, b: dpofast.linear_logprobs(h, w, targets, bias=b, max_logits_bytes=vocab * 4 * 40).logps,
        (hidden, weight, bias),
        upstream,
    )
    assert logps.shape == (n,)
    torch.testing.assert_close(logps.double(), truth, atol=2e-5, rtol=1e-6)
    # How exact a product over 50,257 terms is depends on the processor's BLAS: the framework's own error says.
    _, own_grads = gradients(
        lambda h, w, b: reference.linear_logprobs(h, w, targets, bias=b), (hidden, weight, bias), upstream
    )
    for ours, own, true in zip(grads, own_grads, true_grads, strict=True):
        its_error = (own.double() - true).abs().amax().item() if own.numel() else 0.0
        torch.testing.assert_close(ours.double(), true, atol=max(2e-5, 2 * its_error), rtol=1e-5)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("rows_in_budget", [3, 9, 1000])
def test_every_plan_gives_the_same_gradients(needs, rows_in_budget, device):
    *tensors, targets, upstream = head_inputs(device=device)
    budget = rows_in_budget * tensors[1].shape[0] * 4
    leaves = [tensor.clone().requires_grad_(bool(need)) for tensor, need in zip(tensors, needs, strict=True)]
    output = dpofast.linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], max_logits_bytes=budget).logps
    output.backward(upstream)
    _, true_grads = gradients(
        lambda h, w, b: reference.linear_logprobs(h, w, targets, bias=b), [x.double() for x in tensors], upstream
    )
    for leaf, need, true in zip(leaves, needs, true_grads, strict=True):
        assert (leaf.grad is not None) == bool(need)
        if need:
            torch.testing.assert_close(leaf.grad.double(), true, atol=1e-5, rtol=1e-5)


@settings(max_examples=200)
@given(rows=st.integers(0, 5000), most=st.integers(1, 700))
def test_even_rows_leave_no_short_tail(rows, most):
    size = even_rows(rows, most)
    assert 1 <= size <= max(most, 1)
    if rows > most:
        chunks = -(-rows // size)
        assert chunks <= -(-rows // most) + 1
        assert size % 128 == 0 or size == -(-rows // -(-rows // most))


@settings(max_examples=200)
@given(start=st.integers(0, 50), rows=st.integers(0, 5000), most=st.integers(1, 1500))
def test_even_chunks_are_the_fewest_and_of_one_size_up_to_128_rows(start, rows, most):
    parts = even_chunks(start, start + rows, most)
    sizes = [part.stop - part.start for part in parts]
    assert [row for part in parts for row in range(part.start, part.stop)] == [*range(start, start + rows)]
    assert len(parts) == -(-rows // most) and max(sizes, default=0) <= most
    step = 128 if most % 128 == 0 else 1
    assert max(sizes, default=0) - min(sizes, default=0) < 2 * step
    assert all(size % step == 0 for size in sizes[:-1])


@settings(max_examples=200)
@given(
    rows_of_call=st.integers(0, 5000),
    vocab=st.integers(1, 200_000),
    width=st.integers(1, 8192),
    budget=st.integers(1 << 23, 1 << 30),
    dtype=st.sampled_from(DTYPES),
    keep=st.booleans(),
)
def test_plan_stays_inside_the_budget(rows_of_call, vocab, width, budget, dtype, keep):
    plan = HeadPlan.make(rows_of_call, torch.empty(vocab, width, dtype=dtype, device="meta"), budget, keep=keep)
    logits, exp = (4, 2) if dtype.itemsize == 2 else (0, 4)
    used = vocab * (plan.chunk_rows * logits + (plan.scratch_rows + plan.kept_rows) * exp)
    # In place of a float32 dW, whose bytes a 16-bit head that trains may take beside the budget, E of all rows.
    whole = keep and dtype.itemsize == 2 and plan.kept_rows == rows_of_call
    assert used <= total_bytes(plan.buffers) <= budget + whole * 4 * vocab * width
    assert plan.chunk_rows <= max(plan.kept_rows, plan.scratch_rows, 1)
    assert plan.kept_rows <= rows_of_call
    assert plan.scratch_rows > 0 or plan.kept_rows == rows_of_call


def test_rows_of_a_buffer_on_a_gpu_start_at_multiples_of_16_elements():
    """A kernel then reads 16 bytes at a time at V = 50,257; a CPU's bfloat16 products would read what lies between."""
    for device, stride in (("meta", 50_272), ("cpu", 50_257)):
        buffer = exp_rows_like(torch.empty(50_257, 1, device=device), 3, torch.bfloat16)
        assert buffer.shape == (3, 50_257) and buffer.stride() == (stride, 1)


def test_statistics_match_the_reference(device):
    hidden, weight, bias, targets, _ = head_inputs(device=device)
    stats = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    options = {"logit_scale": 1.3, "softcap": 5.0, "temperature": 1.5}
    z = reference.scaled_logits(torch.nn.functional.linear(hidden, weight, bias).double(), **options)
    truth = reference.token_statistics(z, targets)
    for backend in BACKENDS:
        output = dpofast.linear_logprobs(hidden, weight, targets, bias=bias, stats=stats, backend=backend, **options)
        for name in stats:
            value = getattr(output, name)
            assert not value.requires_grad
            torch.testing.assert_close(
                value.double(), truth[name].double(), atol=2e-5, rtol=1e-5, msg=f"{backend} {name}"
            )
        assert torch.equal(output.is_top1, truth["is_top1"])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extreme_logits_stay_exact(backend, device):
    hidden = torch.eye(3, device=device)
    weight = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], device=device)
    targets = torch.tensor([0, 0, 2], device=device)
    logps, (dh,) = gradients(
        lambda h: dpofast.linear_logprobs(h, weight, targets, backend=backend).logps,
        [hidden],
        torch.ones(3, device=device),
    )
    torch.testing.assert_close(logps.cpu(), torch.tensor([0.0, -2e4, -torch.log(torch.tensor(3.0))]))
    assert torch.isfinite(dh).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_ignored_row_may_hold_nan(backend, device):
    hidden, weight, bias, targets, upstream = head_inputs(device=device)
    hidden[targets == -100] = float("nan")
    logps, grads = gradients(
        lambda h, w, b: dpofast.linear_logprobs(h, w, targets, bias=b, backend=backend).logps,
        (hidden, weight, bias),
        upstream,
    )
    assert (logps[targets == -100] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][targets == -100] == 0).all()


def test_all_rows_ignored(device):
    hidden, weight, bias, targets, upstream = head_inputs(device=device)
    logps, grads = gradients(
        lambda h, w, b: dpofast.linear_logprobs(h, w, torch.full_like(targets, -100), bias=b).logps,
        (hidden, weight, bias),
        upstream,
    )
    assert (logps == 0).all() and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", [*BACKENDS, "fused"])
def test_a_hidden_state_that_is_not_finite_makes_its_own_row_nan_only(backend, value, device):
    hidden, weight, _, targets, upstream = head_inputs(device=device)
    hidden[1, 3] = value
    others = torch.arange(len(hidden), device=device) != 1
    for trains in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        with torch.no_grad():
            logps = dpofast.linear_logprobs(*leaves, targets, backend=backend).logps
        output = dpofast.linear_logprobs(*leaves, targets, backend=backend).logps
        for values in (logps, output):
            assert values[1].isnan() and values[others].isfinite().all()
        output.backward(upstream)
        assert leaves[0].grad[1].isnan().all() and leaves[0].grad[others].isfinite().all()
        assert not trains or leaves[1].grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_reaches_the_loss_and_the_gradients(dtype):
    """Never a wrong finite number: a step over a broken hidden state shows."""
    hidden, weight, _, targets, _ = head_inputs(n=40, dtype=dtype)
    hidden[1] = float("nan")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    cu_targets, pairs = torch.tensor([0, 15, 40], dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32)
    output = dpofast.linear_preference_loss(*leaves, targets, cu_targets, pairs, torch.tensor([-30.0, -40.0]))
    output.loss.backward()
    assert output.loss.isnan() and output.logps[0].isnan() and output.logps[1].isfinite()
    assert leaves[0].grad[1].isnan().all() and leaves[1].grad.isnan().any()


def test_a_head_with_nan_makes_every_row_nan():
    hidden, weight, _, targets, _ = head_inputs()
    weight[7, 2] = float("nan")
    for backend in (*BACKENDS, "fused"):
        logps = dpofast.linear_logprobs(hidden, weight, targets, backend=backend).logps
        assert logps[targets != -100].isnan().all() and (logps[targets == -100] == 0).all()


@pytest.mark.parametrize("budget_rows", [5, 1000])
def test_gradcheck_in_float64(budget_rows):
    hidden, weight, bias, targets, _ = head_inputs(n=7, d=3, vocab=11, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    def function(h, w, b):
        return dpofast.linear_logprobs(h, w, targets, bias=b, softcap=4.0, max_logits_bytes=budget_rows * 88).logps

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_from_logits(backend, dtype, device):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 5, 129, generator=generator) * 4).to(device, dtype)
    targets = torch.randint(0, 129, (3, 5), generator=generator)
    targets[1, 2] = -100
    targets, upstream = targets.to(device), torch.randn(3, 5, generator=generator).to(device)
    truth, (true_grad,) = gradients(
        lambda x: reference.logprobs(x, targets, temperature=0.7), [logits.double()], upstream
    )
    logps, (grad,) = gradients(
        lambda x: dpofast.logprobs(x, targets, temperature=0.7, backend=backend), [logits], upstream
    )
    assert logps.dtype == torch.float32 and grad.dtype == dtype
    assert relative_error(logps, truth) < 1e-6
    assert relative_error(grad, true_grad) < max(torch.finfo(dtype).eps, 1e-6)


def test_logprobs_of_non_contiguous_logits(device):
    logits = torch.randn(129, 6).t().to(device)
    targets = torch.arange(6, device=device)
    for backend in BACKENDS:
        torch.testing.assert_close(
            dpofast.logprobs(logits, targets, backend=backend), reference.logprobs(logits, targets)
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inplace_backward_writes_the_gradient_over_the_logits(backend, device):
    leaf = torch.randn(4, 50).to(device).requires_grad_()
    targets = torch.tensor([0, 3, 49, -100], device=device)
    (expected,) = torch.autograd.grad(reference.logprobs(leaf * 1.0, targets).sum(), leaf)
    logits = leaf * 1.0
    output = dpofast.logprobs(logits, targets, inplace_backward=True, backend=backend).sum()
    output.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(logits.detach(), expected)
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        output.backward()


def test_backward_twice_and_no_grad(device):
    hidden, weight, bias, targets, upstream = head_inputs(device=device)
    hidden.requires_grad_(), weight.requires_grad_()
    output = dpofast.linear_logprobs(hidden, weight, targets, bias=bias).logps
    first = torch.autograd.grad(output, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(output, (hidden, weight), upstream)
    for a, b in zip(first, second, strict=True):  # a BLAS on a busy machine may split its work otherwise
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert not dpofast.linear_logprobs(hidden, weight, targets, bias=bias).logps.requires_grad


def test_double_backward_raises(device):
    hidden, weight, _, targets, upstream = head_inputs(device=device)
    hidden.requires_grad_()
    output = dpofast.linear_logprobs(hidden, weight, targets).logps.sum()
    (grad,) = torch.autograd.grad(output, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_tied_embeddings_add_both_gradients():
    weight = torch.randn(50, 8, requires_grad=True)
    ids, targets = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    dpofast.linear_logprobs(weight[ids], weight, targets).logps.sum().backward()
    ours, weight.grad = weight.grad, None
    reference.linear_logprobs(weight[ids], weight, targets).sum().backward()
    torch.testing.assert_close(ours, weight.grad)


def test_autocast_casts_once_and_returns_float32(device):
    hidden, weight, _, targets, _ = head_inputs(device=device)
    leaf = hidden.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = dpofast.linear_logprobs(leaf, weight, targets).logps
    output.sum().backward()
    expected = dpofast.linear_logprobs(leaf.bfloat16(), weight.bfloat16(), targets).logps
    assert output.dtype == torch.float32 and leaf.grad.dtype == torch.float32
    torch.testing.assert_close(output.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow(13)
def test_the_fused_backend_equals_the_plan_of_a_policy(nan_empty):
    """At step 0 policy and reference are one model: 256 tokens' margin, whatever path each of them takes, is 0."""
    # The interpreter's tl.dot is wrong in bfloat16.
    for dtype, options in ((torch.float32, OPTIONS[0]), (torch.float16, OPTIONS[2])):
        hidden, weight, bias, targets, _ = head_inputs(n=512, d=64, vocab=525, dtype=dtype)
        leaf = hidden.clone().requires_grad_()
        policy = dpofast.linear_logprobs(leaf, weight, targets, bias=bias, backend="torch", **options).logps
        ref = dpofast.linear_logprobs(hidden, weight, targets, bias=bias, backend="fused", **options).logps
        log_ratios = (policy - ref).detach().view(2, 256).sum(1)
        assert abs(0.1 * (log_ratios[0] - log_ratios[1])) < 1e-5
        assert (ref[targets == -100] == 0).all()


def test_the_fused_backend_keeps_logits_off_memory_where_it_can():
    hidden, weight, bias, targets, upstream = head_inputs()
    with Cost() as cost:
        output = dpofast.linear_logprobs(hidden, weight, targets, bias=bias, backend="fused")
    assert cost.gemm_flops == 0  # tl.dot
    assert cost.peak_bytes_beyond(output.logps) <= 64 * len(targets)
    # Statistics need the logits: the same plan, and the same bits, as "triton".
    results = []
    for backend in ("fused", "triton"):
        leaf = hidden.clone().requires_grad_()
        output = dpofast.linear_logprobs(leaf, weight, targets, bias=bias, backend=backend, stats=("entropy",))
        output.logps.backward(upstream)
        results.append((output.logps.detach(), output.entropy, leaf.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_the_fused_backend_in_a_preference_loss_without_gradient():
    hidden, weight, bias, targets, _ = head_inputs(n=40)
    cu_targets, pairs = torch.tensor([0, 15, 40], dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32)
    known = (hidden, weight, targets, cu_targets, pairs, torch.tensor([-30.0, -40.0]))
    with Cost() as cost:
        fused = dpofast.linear_preference_loss(*known, bias=bias, backend="fused")
    assert cost.gemm_flops == 0
    torch.testing.assert_close(fused.logps, dpofast.linear_preference_loss(*known, bias=bias).logps)


def test_where_the_fused_backend_cannot_run():
    hidden, weight, _, targets, _ = head_inputs(dtype=torch.float64)
    with pytest.raises(ValueError, match="backend='fused' multiplies .* got torch.float64: use backend='auto'"):
        dpofast.linear_logprobs(hidden, weight, targets, backend="fused")
    with pytest.raises(ValueError, match="backend='fused' multiplies .* got neither"):
        dpofast.logprobs(hidden, targets, backend="fused")


def test_where_auto_asks_the_tuned_table(monkeypatch):
    cuda = torch.device("cuda")
    assert choose_backend("auto", cuda, torch.bfloat16) == "auto"
    for dtype in (torch.float32, None):
        assert choose_backend("auto", cuda, dtype) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="backend='fused' needs compute capability 8.0 or above, got 7.5"):
        choose_backend("fused", cuda, torch.bfloat16)


@pytest.mark.parametrize("budget_rows", [5, 1000])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 0, 0)])
def test_the_operators_pass_opcheck(budget_rows, needs, device):
    *tensors, targets, _ = head_inputs(n=7, d=4, vocab=11, device=device)
    leaves = [tensor.requires_grad_(bool(need)) for tensor, need in zip(tensors, needs, strict=True)]
    arguments = (*leaves, targets, 1.0, 1.0, None, -100, "entropy", "torch", budget_rows * 44, *map(bool, needs))
    torch.library.opcheck(linear_logprobs_op, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_torch_compile_without_a_graph_break(backend, device):
    *tensors, targets, upstream = head_inputs(n=9, d=8, vocab=33, device=device)

    def loss(h, w, b):
        output = dpofast.linear_logprobs(h * 2, w, targets, bias=b, stats=("entropy",))
        return output.logps * 3 + output.entropy * 0

    logps, grads = gradients(loss, tensors, upstream)
    compiled, compiled_grads = gradients(torch.compile(loss, fullgraph=True, backend=backend), tensors, upstream)
    torch.testing.assert_close(compiled, logps)
    for ours, expected in zip(compiled_grads, grads, strict=True):
        torch.testing.assert_close(ours, expected)
