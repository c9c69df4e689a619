"""linear_preference_loss against the float64 reference: every plan, every gradient, and its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpofast
from bench.cost import Cost
from dpofast import PreferenceLoss, reference
from dpofast.head.linear_preference_op import linear_preference_op
from dpofast.head.pair_blocks import components, joined_runs
from dpofast.losses.coefficients import runs_fused
from dpofast.losses.columns import NO_COLUMNS
from dpofast.losses.functional import token_preference_loss
from dpofast.losses.sequences import pair_logprobs
from tests.support.close import named
from tests.support.losses_cases import LOSSES

LOSS = PreferenceLoss(beta=0.3, label_smoothing=0.1)
LENGTHS = [5, 3, 1, 7, 0, 4, 2, 6]
# A chain, an interleaved couple of pairs, and a sequence that no pair names; the fifth is empty.
PAIRS = [[0, 1], [3, 2], [3, 5], [6, 4]]


def inputs(dtype=torch.float32, d=12, vocab=61, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    hidden = torch.randn(n, d, generator=generator).to(device, dtype)
    weight = (torch.randn(vocab, d, generator=generator) / d**0.5 * 3).to(device, dtype)
    bias = torch.randn(vocab, generator=generator).to(device, dtype)
    targets = torch.randint(0, vocab, (n,), generator=generator)
    targets[::6] = -100
    cu_targets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    ref = -10 * torch.rand(len(LENGTHS), generator=generator)
    pairs = torch.tensor(PAIRS, dtype=torch.int32)
    return (hidden, weight, bias), targets.to(device), cu_targets, pairs, ref.to(device)


def truth(tensors, targets, cu_targets, pairs, ref, upstream, **options):
    """Loss terms and gradients of upstream · loss in float64, by plain autograd over full logits."""
    hidden, weight, bias = (tensor.detach().double().requires_grad_() for tensor in tensors)
    logps = reference.linear_logprobs(hidden, weight, targets, bias=bias, **options)
    sums = reference.sequence_logprobs(logps, cu_targets)
    losses, rewards = reference.sigmoid_loss(sums, pairs, ref.double(), beta=0.3, label_smoothing=0.1)
    (losses.mean() * upstream).backward()
    return losses.detach(), sums.detach(), rewards, [tensor.grad for tensor in (hidden, weight, bias)]


def check(tensors, rest, *, needs=(1, 1, 1), upstream=1.0, tolerance=1e-5, **options):
    """Compare losses, log-probs, rewards and gradients with float64's; a failure names which of them differs."""
    leaves = [tensor.detach().clone().requires_grad_(bool(need)) for tensor, need in zip(tensors, needs, strict=True)]
    output = dpofast.linear_preference_loss(leaves[0], leaves[1], *rest, bias=leaves[2], loss=LOSS, **options)
    transform = {name: options[name] for name in ("softcap", "logit_scale", "temperature") if name in options}
    losses, sums, rewards, gradients = truth(tensors, *rest, upstream, **transform)
    expected = {"losses": losses, "logps": sums, "rewards": rewards, "loss": losses.mean()}
    for name, value in expected.items():
        actual = getattr(output, name).detach().double()
        atol = tolerance if name in ("losses", "loss") else 5 * tolerance
        torch.testing.assert_close(actual, value, atol=atol, rtol=tolerance, msg=named(name))
    if any(needs):
        (output.loss * upstream).backward()
    for name, leaf, need, value in zip(("hidden", "weight", "bias"), leaves, needs, gradients, strict=True):
        assert (leaf.grad is not None) == bool(need), name
        if need:
            actual, value = leaf.grad.double() / value.abs().max(), value / value.abs().max()
            torch.testing.assert_close(actual, value, atol=tolerance, rtol=tolerance, msg=named(f"gradient of {name}"))


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("rows_in_budget", [3, 9, 17, 1000])
def test_every_plan_gives_the_same_numbers(needs, rows_in_budget, device):
    tensors, *rest = inputs(device=device)
    check(tensors, rest, needs=needs, upstream=1.7, max_logits_bytes=rows_in_budget * 61 * 4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 4.0, "logit_scale": 1.3, "temperature": 0.7}], ids=["plain", "all"]
)
def test_backends_and_options(backend, options, device):
    tensors, *rest = inputs(device=device)
    check(tensors, rest, backend=backend, **options)


@pytest.mark.parametrize("rows_in_budget", [8, 1000])
def test_bfloat16_rounds_its_gradients_once(rows_in_budget, device):
    tensors, *rest = inputs(torch.bfloat16, device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = dpofast.linear_preference_loss(
        leaves[0], leaves[1], *rest, bias=leaves[2], loss=LOSS, max_logits_bytes=rows_in_budget * 61 * 6
    )
    output.loss.backward()
    losses, _, _, gradients = truth(tensors, *rest, 1.0)
    torch.testing.assert_close(output.losses.double(), losses, atol=1e-5, rtol=1e-5)
    for leaf, expected in zip(leaves, gradients, strict=True):
        error = (leaf.grad.double() - expected).abs().max() / expected.abs().max()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_backward_twice_gives_the_same_and_create_graph_raises(device):
    (hidden, weight, bias), *rest = inputs(device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = dpofast.linear_preference_loss(*leaves, *rest, bias=bias, loss=LOSS).loss * 3
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    loss = dpofast.linear_preference_loss(*leaves, *rest, bias=bias, loss=LOSS).loss
    (grad,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_micro_batches_add_up(device):
    (hidden, weight, bias), targets, cu_targets, pairs, ref = inputs(device=device)
    leaf = weight.clone().requires_grad_()
    dpofast.linear_preference_loss(hidden, leaf, targets, cu_targets, pairs, ref, bias=bias).loss.backward()
    whole, leaf.grad = leaf.grad, None
    for p in range(len(pairs)):
        dpofast.linear_preference_loss(
            hidden, leaf, targets, cu_targets, pairs[p : p + 1], ref, bias=bias, num_pairs=len(pairs)
        ).loss.backward()
    torch.testing.assert_close(leaf.grad, whole)


@given(st.data())
def test_components_are_the_shortest_closed_runs(data):
    count = data.draw(st.integers(1, 12))
    sequence = st.integers(0, count - 1)
    pairs = (
        data.draw(st.lists(st.lists(sequence, min_size=2, max_size=2, unique=True), max_size=8)) if count > 1 else []
    )
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    runs = components(cu, pairs)
    assert [start for start, _ in runs] + [count] == [0] + [stop for _, stop in runs]
    inside = [any(start <= a < stop and start <= b < stop for start, stop in runs) for a, b in pairs]
    assert all(inside)
    cuts = {stop for _, stop in runs}
    for cut in range(1, count):
        crossed = any(min(pair) < cut <= max(pair) for pair in pairs)
        assert (cut in cuts) == (not crossed)
    joined = joined_runs(cu, runs, 10)
    assert [start for start, _ in joined] + [count] == [0] + [stop for _, stop in joined]
    for start, stop in joined:
        assert cu[stop] - cu[start] <= 10 or (start, stop) in runs


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
def test_the_operator_passes_opcheck(needs):
    tensors, *rest = inputs()
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    arguments = (None, LOSS.encoded, 4, None, 1.0, 1.0, None, -100, "torch", 9 * 61 * 4, *needs)
    torch.library.opcheck(linear_preference_op, (*leaves, *rest, *arguments, *NO_COLUMNS))


@pytest.mark.slow(16)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_without_a_graph_break(backend, device):
    (hidden, weight, bias), *rest = inputs(device=device)

    def loss(h, w):
        return dpofast.linear_preference_loss(h * 2, w, *rest, bias=bias, loss=LOSS).loss * 3

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_targets": torch.tensor([0, 28])}, "cu_targets: expected int32 on the CPU"),
        ({"cu_targets": torch.tensor([0, 5, 8, 9, 16, 16, 20, 22, 27], dtype=torch.int32)}, "to rise from 0 to the 28"),
        ({"pairs": torch.tensor([[0, 8]], dtype=torch.int32)}, r"sequence numbers in \[0, 8\)"),
        ({"pairs": torch.tensor([[0, 1]])}, "pairs: expected int32 on the CPU"),
        ({"pairs": torch.zeros(0, 2, dtype=torch.int32)}, "at least one pair"),
        ({"ref_logps": torch.zeros(7)}, "ref_logps: expected shape"),
        ({"targets": torch.full((28,), 61)}, r"ids in \[0, 61\)"),
        ({"backend": "reference"}, "backend: expected auto, triton or torch"),
        ({"max_logits_bytes": 3}, "max_logits_bytes: expected at least one row"),
    ],
)
def test_bad_arguments(change, message):
    (hidden, weight, _), targets, cu_targets, pairs, ref = inputs()
    arguments = {"targets": targets, "cu_targets": cu_targets, "pairs": pairs, "ref_logps": ref, **change}
    with pytest.raises(ValueError, match=message):
        dpofast.linear_preference_loss(hidden, weight, **arguments)


def per_token_loss(tensors, targets, cu_targets, pairs, ref, loss, **options):
    """The same by linear_logprobs, then token_preference_loss: another plan of the head."""
    hidden, weight, bias = tensors
    stats = ("log_sum_sq_probs",) if loss.use_weighting else ()
    output = dpofast.linear_logprobs(hidden, weight, targets, bias=bias, stats=stats)
    known = {"log_sum_sq_probs": output.log_sum_sq_probs, "counted": targets != -100, **options}
    return token_preference_loss(output.logps, cu_targets, pairs, ref, loss=loss, **known)


BACKENDS = [(name, "auto") for name in LOSSES]
BACKENDS += [(name, "triton") for name in LOSSES if runs_fused(PreferenceLoss(**LOSSES[name]), "triton")]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_every_loss_equals_its_per_token_form(name, backend, device):
    """With ignored targets, shared branches and several flushes."""
    loss = PreferenceLoss(**LOSSES[name])
    tensors, targets, cu_targets, pairs, ref = inputs(device=device)
    ref_tokens = -torch.rand(len(targets), device=device)
    ref = None if not loss.needs_reference else ref
    if ref is not None and loss.ld_alpha is not None:
        ref = pair_logprobs(ref_tokens, cu_targets, pairs, ld_alpha=loss.ld_alpha)
    results = []
    for function, options in (
        (per_token_loss, {"backend": "auto" if device.type == "cuda" else "torch"}),
        (linear_loss, {"backend": backend, "max_logits_bytes": 9 * 61 * 4}),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = function(leaves, targets, cu_targets, pairs, ref, loss, num_pairs=7, **options)
        (output.loss * 1.7).backward()
        results.append((output, [leaf.grad for leaf in leaves]))
    (expected, gradients), (got, got_gradients) = results
    for field in ("loss", "losses", "logps", "rewards"):
        torch.testing.assert_close(getattr(got, field), getattr(expected, field), atol=2e-5, rtol=1e-5)
    for a, b in zip(got_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-5)


def linear_loss(tensors, targets, cu_targets, pairs, ref, loss, **options):
    hidden, weight, bias = tensors
    return dpofast.linear_preference_loss(
        hidden, weight, targets, cu_targets, pairs, ref, loss=loss, bias=bias, **options
    )


@pytest.mark.parametrize("name", ["sft", "bco running mean", "mix of all modifiers"])
def test_other_losses_compile_without_a_graph_break(name):
    loss = PreferenceLoss(**LOSSES[name])
    tensors, targets, cu_targets, pairs, ref = inputs()
    ref = None if not loss.needs_reference else ref
    if loss.ld_alpha is not None:
        ref = torch.full((len(pairs), 2), -5.0)
    earlier = torch.tensor([3.0, 8.0], dtype=torch.float64)

    def function(hidden, weight):
        known = (targets, cu_targets, pairs, ref)
        return linear_loss((hidden, weight, tensors[2]), *known, loss, earlier_rewards=earlier).loss

    grads = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:2]]
        run(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_separable_losses_do_three_gemms_and_coupled_ones_recompute(name):
    """A budget of 20 rows for 28 targets, whose longest component has ten."""
    loss = PreferenceLoss(**LOSSES[name])
    (hidden, weight, _), targets, cu_targets, _, ref = inputs()
    pairs = torch.tensor([[1, 2], [5, 6]], dtype=torch.int32)
    ref = None if not loss.needs_reference else ref if loss.ld_alpha is None else torch.zeros(2, 2)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with Cost() as cost:
        known = (targets, cu_targets, pairs, ref)
        output = dpofast.linear_preference_loss(*leaves, *known, loss=loss, max_logits_bytes=20 * 61 * 4)
        output.loss.backward()
    units = cost.gemm_units(len(targets), hidden.shape[1], weight.shape[0])
    assert units > 3 if loss.coupled else units == 3
