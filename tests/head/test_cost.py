"""bench/cost.py against counts done by hand; then the log-prob engine's GEMMs and peak bytes against its own table."""

import itertools

import pytest
import torch

import dpofast
from bench.cost import Cost
from dpofast.common.backend import choose_backend
from dpofast.head.engine.interface import HeadInputs, Needs
from dpofast.head.engine.make import make_engine
from dpofast.head.options import STATS, LogitOptions
from dpofast.head.planning import plan as engine_plan
from dpofast.head.planning.dtypes import scaleless_exp_dtype
from dpofast.losses.config import PreferenceLoss

pytestmark = pytest.mark.slow(100)

M, K, N = 3, 5, 7
UNIT = 2 * M * K * N


def gemm_operands(dtype=torch.float32):
    return torch.randn(M, K, dtype=dtype), torch.randn(K, N, dtype=dtype), torch.randn(M, N, dtype=dtype)


def batched_operands():
    return torch.randn(2, M, K), torch.randn(2, K, N), torch.randn(2, M, N)


@pytest.mark.parametrize(
    ("function", "operands", "flops"),
    [
        (lambda a, b, c: torch.mm(a, b), gemm_operands, UNIT),
        (lambda a, b, c: torch.mm(a, b, out=c), gemm_operands, UNIT),
        (lambda a, b, c: torch.mm(input=a, mat2=b), gemm_operands, UNIT),
        (lambda a, b, c: torch.mm(b.t(), a.t()), gemm_operands, UNIT),
        (lambda a, b, c: a @ b, gemm_operands, UNIT),
        (lambda a, b, c: torch.addmm(c, a, b, alpha=-1.0), gemm_operands, UNIT),
        (lambda a, b, c: torch.addmm(c, a, b, out=c), gemm_operands, UNIT),
        (lambda a, b, c: c.addmm_(a, b), gemm_operands, UNIT),
        (lambda a, b, c: torch.nn.functional.linear(a, b.t(), c[0]), gemm_operands, UNIT),
        (lambda a, b, c: torch.bmm(a, b), batched_operands, 2 * UNIT),
        (lambda a, b, c: torch.bmm(a, b, out=c), batched_operands, 2 * UNIT),
        (lambda a, b, c: torch.baddbmm(c, a, b), batched_operands, 2 * UNIT),
        (lambda a, b, c: torch.baddbmm(c, a, b, out=c), batched_operands, 2 * UNIT),
        (lambda a, b, c: c.baddbmm_(a, b), batched_operands, 2 * UNIT),
        (lambda a, b, c: torch.addbmm(c[0], a, b), batched_operands, 2 * UNIT),
        (lambda a, b, c: c[0].addbmm_(a, b), batched_operands, 2 * UNIT),
        (lambda a, b, c: torch.einsum("bij,bjk->bik", a, b), batched_operands, 2 * UNIT),
        (lambda a, b, c: torch.mv(a, b[:, 0]), gemm_operands, 0),
        (lambda a, b, c: a[:0] @ b, gemm_operands, 0),
        (lambda a, b, c: c.exp().sum(), gemm_operands, 0),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_gemm_work_is_counted(function, operands, flops, inference):
    tensors = operands()
    with torch.inference_mode(inference), Cost() as cost:
        function(*tensors)
    assert cost.gemm_flops == flops
    assert cost.gemm_units(M, K, N) == flops / UNIT


@pytest.mark.gpu(twin="test_gemm_work_is_counted")  # on a CPU these forms do not exist
@pytest.mark.parametrize("into", [False, True])
def test_gemms_that_widen_their_result_are_counted(into, device):
    a, b, c = (x.to(device) for x in gemm_operands(torch.bfloat16))
    wide = c.float()
    with Cost() as cost:
        torch.mm(a, b, out_dtype=torch.float32, **({"out": wide} if into else {}))
        torch.addmm(wide, a, b, out_dtype=torch.float32, **({"out": wide} if into else {}))
    assert cost.gemm_flops == 2 * UNIT


def test_a_backward_pass_is_counted():
    a, b, _ = gemm_operands()
    a.requires_grad_(), b.requires_grad_()
    with Cost() as cost:
        (a @ b).sum().backward()
    assert cost.gemm_flops == 3 * UNIT


def floats(count):
    return 4 * count


def test_peak_is_of_what_lives_at_once():
    with Cost() as cost:
        x = torch.zeros(100)
        y = x + 1
        assert cost.live_bytes == floats(200)
        del x
        assert cost.live_bytes == floats(100)
        z = y.exp() * 2
        assert cost.peak_bytes == floats(300)
    assert cost.live_bytes == floats(200)
    del y, z
    assert (cost.live_bytes, cost.peak_bytes) == (0, floats(300))


def test_peak_beyond_some_tensors():
    with Cost() as cost:
        early = torch.zeros(100)
        scratch = torch.zeros(50) + 1
        del scratch
        late = early.new_zeros(1000)
    assert cost.peak_bytes == floats(1100)
    assert cost.peak_bytes_beyond(late) == floats(200)
    assert cost.peak_bytes_beyond(late[2:], early.view(10, 10), torch.zeros(7)) == floats(100)
    assert cost.peak_bytes_beyond() == cost.peak_bytes


def test_views_and_work_in_place_add_nothing():
    with Cost() as cost:
        x = torch.zeros(10, 10)
        view = x.t()[2:].reshape(-1)[3:]  # of a transposed slice, so reshape copies 80 of the elements
        assert cost.live_bytes == floats(180)
        rows = x[3:].view(-1)
        x.add_(1).exp_()
        torch.add(x[:5], x[5:], out=x[:5])
        assert cost.live_bytes == floats(180)
        del x
        assert cost.live_bytes == floats(180)
        del rows, view
        assert cost.live_bytes == 0


def test_an_out_that_grows_is_followed():
    with Cost() as cost:
        out = torch.empty(0)
        torch.mm(torch.ones(4, 1), torch.ones(1, 5), out=out)
        assert cost.live_bytes == floats(20)
    assert cost.peak_bytes == floats(29)


def test_inputs_count_only_when_asked():
    base = torch.zeros(10, 10)
    for count_inputs, expected in ((False, 0), (True, 100)):
        with Cost(count_inputs=count_inputs) as cost:
            view = base[2:4].add_(1).t()
            assert cost.live_bytes == floats(expected)
        del view
        assert cost.live_bytes == floats(expected)


def test_an_input_that_dies_is_not_mistaken_for_its_successor():
    with Cost() as cost:
        for _ in range(20):
            fresh = torch.from_numpy(torch.zeros(1000).numpy())  # no operator makes it: an input
            fresh.add_(1)
            del fresh
            made = torch.zeros(1000)
            assert cost.live_bytes == floats(1000)
            del made


def test_a_tensor_from_python_numbers_is_made_inside():
    with Cost() as cost:
        x = torch.tensor([1.0, 2.0, 3.0])
        assert cost.live_bytes == floats(3)
    assert len(x) == 3


def test_what_autograd_saves_lives_until_backward():
    leaf = torch.zeros(100, requires_grad=True)
    with Cost() as cost:
        loss = leaf.exp().sum()
        assert cost.live_bytes == floats(101)
        loss.backward()
        assert cost.live_bytes == floats(101)  # the loss and the gradient
        assert leaf.grad is not None


@torch.library.custom_op("dpofast_test_cost::scores", mutates_args=())
def scores(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w).exp_().sum(1)


@scores.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0])


@torch.library.custom_op("dpofast_test_cost::scores_grad", mutates_args=())
def scores_grad(grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w).exp_().mul_(grad.unsqueeze(1)) @ w.t()


scores.register_autograd(
    lambda ctx, grad: (scores_grad(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("dpofast_test_cost::by_device", mutates_args=())
def by_device(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


@by_device.register_kernel("cpu")
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w @ w.t()


def test_custom_operators_are_counted_inside():
    x, w, _ = gemm_operands()
    with Cost() as plain:
        inside = scores(x, w)
    assert (plain.gemm_flops, plain.live_bytes, plain.peak_bytes) == (UNIT, floats(M), floats(M * N + M))
    leaf = x.clone().requires_grad_()
    with Cost() as cost:
        total = scores(leaf, w).sum()
        total.backward()
    assert cost.gemm_flops == 3 * UNIT
    assert torch.equal(inside.sum(), total.detach())
    expected = x.clone().requires_grad_()
    (expected @ w).exp().sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_a_custom_operator_is_counted_by_its_devices_kernel():
    x, w, _ = gemm_operands()
    with Cost() as cost:
        by_device(x, w)
    assert cost.gemm_flops == 2 * UNIT


# N = 8192, V = 151,936, D = 4096 and 1 GiB of logits, each dimension 64 times smaller; so are the engine's row counts.
SCALE = 64
HEAD_N, HEAD_D, HEAD_V = 8192 // SCALE, 4096 // SCALE, 151936 // SCALE
ROW_BYTES = 4 * HEAD_V
BUDGET = (1 << 30) // SCALE**2
WHOLE = HEAD_N * ROW_BYTES * 3 // 2  # every row of E, and what goes with it
PLANS = {"none": (False, False), "frozen": (True, False), "trained": (True, True), "head only": (False, True)}


@pytest.fixture(autouse=True)
def engine_scaled_down(monkeypatch):
    for constant in (
        "SCRATCH_ROWS",
        "_CPU_SCRATCH_ROWS",
        "_ROW_MULTIPLE",
        "TEMPORARY_ROWS",
        "_UPCAST_ROWS",
        "TILE_ROWS",
        "TILE_COLUMNS",
        "KEPT_ROWS",
        "_DW_ROWS",
    ):
        monkeypatch.setattr(engine_plan, constant, max(1, getattr(engine_plan, constant) // SCALE))


def rows_kept(device, dtype, budget, **options):
    hidden, weight = (torch.empty(rows, HEAD_D, dtype=dtype, device=device) for rows in (HEAD_N, HEAD_V))
    targets, backend = torch.zeros(HEAD_N, dtype=torch.int64, device=device), choose_backend("auto", device, dtype)
    inputs = HeadInputs(hidden, weight, None, targets, LogitOptions())
    return make_engine(inputs, backend, budget, needs=Needs(True, True, True), **options).plan.kept_rows


def head_cost(device, plan, dtype, bias, function):
    """Cost of function(hidden, weight, bias, targets) and of backward from what it returns, and the gradients."""
    need_dh, need_dw = PLANS[plan]
    hidden = torch.randn(HEAD_N, HEAD_D, device=device).to(dtype).requires_grad_(need_dh)
    weight = (torch.randn(HEAD_V, HEAD_D, device=device) / 8).to(dtype).requires_grad_(need_dw)
    bias = torch.randn(HEAD_V, device=device).to(dtype).requires_grad_(need_dw) if bias else None
    targets = torch.randint(0, HEAD_V, (HEAD_N,), device=device)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    with Cost() as cost:
        result = function(hidden, weight, bias, targets)
        grads = torch.autograd.grad(result, leaves, torch.ones_like(result)) if leaves else ()
    return cost, grads


def linear_logprobs_cost(device, plan, dtype, budget, bias=False, **options):
    def function(hidden, weight, bias, targets):
        return dpofast.linear_logprobs(hidden, weight, targets, bias=bias, max_logits_bytes=budget, **options).logps

    return head_cost(device, plan, dtype, bias, function)


def linear_preference_cost(device, plan, dtype, budget, sequences, pairs, loss, bias=False, **options):
    """Sequences of equal length; pairs (P, 2)."""
    cu_targets = torch.arange(0, HEAD_N + 1, HEAD_N // sequences, dtype=torch.int32)
    ref_logps = torch.full((sequences,), -100.0, device=device)
    pairs = torch.tensor(pairs, dtype=torch.int32)

    def function(hidden, weight, bias, targets):
        known = (hidden, weight, targets, cu_targets, pairs, ref_logps)
        options_of_head = {"bias": bias, "max_logits_bytes": budget, **options}
        return dpofast.linear_preference_loss(*known, loss=loss, **options_of_head).loss

    return head_cost(device, plan, dtype, bias, function)


def allowed_bytes(plan, dtype, budget, flushes):
    """The budget, E·W (N, D) of a frozen head, dW in float32 of a 16-bit one that is flushed more than once, and O(N).

    On a CPU E, and so E·W, is float32 for float16; on a GPU its dW is float32 until the end.
    """
    need_dh, need_dw = PLANS[plan]
    allowed = budget + 64 * HEAD_N  # targets, log-probs, coefficients and the like: eight of eight bytes a row
    if need_dh and not need_dw:
        allowed += HEAD_N * HEAD_D * scaleless_exp_dtype(dtype).itemsize
    if need_dw and dtype.itemsize == 2 and (flushes > 1 or dtype == torch.float16):
        allowed += 4 * HEAD_V * HEAD_D
    return allowed


OPTIONS = {"plain": {}, "all": {"bias": True, "softcap": 30.0, "stats": STATS}}
budgets = pytest.mark.parametrize("budget", [BUDGET, WHOLE], ids=["scaled", "whole"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# A budget of few rows takes many small products, which are slow in 16 bits.
budgets_and_dtypes = pytest.mark.parametrize(
    ("budget", "dtype"),
    [
        (12 * ROW_BYTES, torch.float32),
        *itertools.product([BUDGET, WHOLE], [torch.float32, torch.bfloat16, torch.float16]),
    ],
    ids=str,
)


@budgets_and_dtypes
@pytest.mark.parametrize("plan", PLANS)
def test_linear_logprobs_does_the_fewest_gemms(device, plan, budget, dtype):
    need_dh, need_dw = PLANS[plan]
    cost, _ = linear_logprobs_cost(device, plan, dtype, budget)
    recomputed = HEAD_N - rows_kept(device, dtype, budget) if need_dw else 0
    units = cost.gemm_units(HEAD_N, HEAD_D, HEAD_V)
    # Without a gradient, a GPU's one product may be a Triton kernel's, which is not counted.
    if not (plan == "none" and device.type == "cuda" and units == 0):
        assert units == 1 + need_dh + need_dw + recomputed / HEAD_N
    assert recomputed == 0 or budget < WHOLE


@budgets_and_dtypes
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_linear_logprobs_stays_inside_its_bytes(device, plan, option, budget, dtype):
    options = OPTIONS[option]
    cost, grads = linear_logprobs_cost(device, plan, dtype, budget, **options)
    flushes = 1 if budget == WHOLE else 2
    assert cost.peak_bytes_beyond(*grads) <= allowed_bytes(plan, dtype, budget, flushes)


SEQUENCES = 32
NEIGHBOURS = [(s, s + 1) for s in range(0, SEQUENCES, 2)]
SEPARABLE = {"sigmoid": PreferenceLoss(), "smoothed": PreferenceLoss(label_smoothing=0.1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@budgets
@pytest.mark.parametrize("kind", SEPARABLE)
@pytest.mark.parametrize("plan", PLANS)
def test_known_pairs_recompute_nothing(device, plan, kind, budget, dtype):
    need_dh, need_dw = PLANS[plan]
    cost, _ = linear_preference_cost(device, plan, dtype, budget, SEQUENCES, NEIGHBOURS, SEPARABLE[kind])
    units = cost.gemm_units(HEAD_N, HEAD_D, HEAD_V)
    if not (plan == "none" and device.type == "cuda" and units == 0):
        assert units == 1 + need_dh + need_dw


@pytest.mark.parametrize("plan", ["trained", "head only"])
def test_pairs_that_chain_all_sequences_recompute_what_does_not_fit(device, plan):
    chain = [(s, s + 1) for s in range(SEQUENCES - 1)]
    cost, _ = linear_preference_cost(device, plan, torch.float32, BUDGET, SEQUENCES, chain, PreferenceLoss())
    kept = rows_kept(device, torch.float32, BUDGET, largest=HEAD_N)
    assert 0 < kept < HEAD_N
    assert cost.gemm_units(HEAD_N, HEAD_D, HEAD_V) == 1 + sum(PLANS[plan]) + (HEAD_N - kept) / HEAD_N


@dtypes
@budgets
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_known_pairs_stay_inside_their_bytes(device, plan, option, budget, dtype):
    options = {name: value for name, value in OPTIONS[option].items() if name != "stats"}
    cost, grads = linear_preference_cost(
        device, plan, dtype, budget, SEQUENCES, NEIGHBOURS, PreferenceLoss(), **options
    )
    flushes = 1 if budget == WHOLE else 2
    assert cost.peak_bytes_beyond(*grads) <= allowed_bytes(plan, dtype, budget, flushes)
