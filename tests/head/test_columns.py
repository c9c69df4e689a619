"""Columns of pairs and lists in linear_preference_loss: its blocks, its operator, its GEMMs, and what it refuses."""

import pytest
import torch

import dpofast
from bench.cost import Cost
from dpofast import PreferenceLoss, reference
from dpofast.head.linear_preference_op import linear_preference_op
from dpofast.head.pair_blocks import components
from dpofast.losses.columns import NO_COLUMNS, PreferenceColumns
from dpofast.losses.functional import token_preference_loss
from tests.support.columns_cases import (
    BEST_AND_WORST,
    list_columns,
    pair_columns,
    pair_losses,
    plackett_luce_losses,
    token_weights,
    weighted_lengths,
    weighted_sums,
)
from tests.support.losses_cases import LENGTHS, PAIRS

D, V = 12, 61
NEEDS = {"trained": (True, True), "head only": (False, True), "frozen": (True, False), "none": (False, False)}
# Of 30 targets: blocks of one component, of two or three, and of all of them.
BUDGETS = [3, 12, 17, 1000]


def inputs(of_lists, *, columns=None, device="cpu", dtype=torch.float32):
    """Hidden states and head; targets, cu_targets, pairs and ref_logps; loss; columns, by default all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(LENGTHS), D, generator=generator).to(device, dtype)
    weight = (torch.randn(V, D, generator=generator) / D**0.5 * 3).to(device, dtype)
    targets = torch.randint(0, V, (sum(LENGTHS),), generator=generator).to(device)
    cu_targets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    ref = -10 * torch.rand(len(LENGTHS), generator=generator).to(device, dtype)
    pairs = torch.tensor(BEST_AND_WORST if of_lists else PAIRS, dtype=torch.int32)
    drawn = pair_columns(len(pairs))
    if columns is None:
        columns = drawn
        if of_lists:
            columns = list_columns(weight=drawn.weight, beta=drawn.beta, token_weights=drawn.token_weights)
    kind = {"kind": "plackett_luce"} if of_lists else {"label_smoothing": 0.1}
    columns = columns.moved(lambda column: column.to(device))
    return [hidden, weight], (targets, cu_targets, pairs, ref), PreferenceLoss(beta=0.3, **kind), columns


def run(tensors, known, loss, columns, needs=(True, True), upstream=1.7, rows=1000, **options):
    """The output of linear_preference_loss and the gradients of upstream · loss."""
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    options["max_logits_bytes"] = rows * V * 4
    output = dpofast.linear_preference_loss(*leaves, *known, loss=loss, columns=columns, **options)
    if any(needs):
        (output.loss * upstream).backward()
    return output, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", BUDGETS)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("of_lists", [False, True], ids=["pairs", "lists"])
def test_every_plan_by_hand(of_lists, needs, rows, backend, device):
    """Losses, log-probs, rewards and gradients in float64 from the equations, over full logits."""
    tensors, known, loss, columns = inputs(of_lists, device=device)
    targets, cu_targets, pairs, ref = known
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    logps = reference.linear_logprobs(*wide, targets)
    sums = weighted_sums(logps, cu_targets, columns.token_weights)
    if of_lists:
        losses = plackett_luce_losses(sums, ref.double(), columns, 0.3)
        rows_of, member = columns.lists.clamp(min=0).long(), (columns.lists >= 0).to(device)
    else:
        lengths = weighted_lengths(cu_targets, columns.token_weights).to(device)
        losses = pair_losses("sigmoid", sums, ref.double(), lengths, pairs, columns, 0.3, 0.1)
        rows_of, member = pairs.long(), torch.ones(1, 1, dtype=torch.bool, device=device)
    (losses.sum() / 7 * 1.7).backward()
    got, gradients = run(tensors, known, loss, columns, needs, rows=rows, backend=backend, num_pairs=7)
    ratios = (sums.detach() - ref.double())[rows_of]
    expected = {
        "losses": losses.detach(),
        "loss": losses.detach().sum() / 7,
        "logps": sums.detach(),
        "rewards": torch.where(member, columns.beta.double()[:, None] * ratios, 0.0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(got, name).detach().double(), value, atol=2e-5, rtol=1e-5)
    for gradient, leaf, need in zip(gradients, wide, needs, strict=True):
        assert (gradient is not None) == need
        if need:
            scale = leaf.grad.abs().max()
            torch.testing.assert_close(gradient.double() / scale, leaf.grad / scale, atol=1e-5, rtol=1e-5)
    if needs[0]:
        assert (gradients[0][columns.token_weights == 0] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("needs", [NEEDS["trained"], NEEDS["frozen"]], ids=["trained", "frozen"])
def test_columns_that_say_nothing_new_change_no_bit(needs, backend, device):
    tensors, known, loss, _ = inputs(False, columns=NO_COLUMNS, device=device)
    loss = PreferenceLoss(beta=0.3, label_smoothing=0.125)
    ones = torch.ones(len(PAIRS), device=device)
    neutral = {
        "weight": ones,
        "margin": 0 * ones,
        "beta": 0.3 * ones,
        "label_smoothing": 0.125 * ones,
        "token_weights": torch.ones(sum(LENGTHS), device=device),
    }
    expected, gradients = run(tensors, known, loss, NO_COLUMNS, needs, rows=12, backend=backend)
    for names in [*([name] for name in neutral), list(neutral)]:
        columns = PreferenceColumns(**{name: neutral[name] for name in names})
        got, own = run(tensors, known, loss, columns, needs, rows=12, backend=backend)
        for name in ("loss", "losses", "logps"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), (name, names)
        pairs = known[2]
        assert torch.equal(got.of_pairs("rewards", pairs), expected.of_pairs("rewards", pairs)), names
        for a, b in zip(own, gradients, strict=True):
            assert a is b is None or torch.equal(a, b), names


@pytest.mark.parametrize("kind", ["kto_pair", "sft", "sigmoid_norm", "mix"])
def test_other_losses_equal_their_per_token_form(kind, device):
    """A coupled loss, and lengths that are sums of weights, of the call and not of one block."""
    of_lists = kind == "mix"
    drawn = pair_columns(len(BEST_AND_WORST if of_lists else PAIRS))
    columns = PreferenceColumns(weight=drawn.weight, beta=drawn.beta, token_weights=drawn.token_weights)
    if of_lists:
        columns = list_columns(**{name: getattr(columns, name) for name in columns.given})
    tensors, known, _, columns = inputs(of_lists, columns=columns, device=device)
    kinds = ("plackett_luce", "sft", "sigmoid") if of_lists else kind
    loss = PreferenceLoss(kind=kinds, beta=0.3)
    known = (*known[:3], known[3] if loss.needs_reference else None)
    got, gradients = run(tensors, known, loss, columns, rows=17)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    logps = dpofast.linear_logprobs(*leaves, known[0]).logps
    backend = "auto" if device.type == "cuda" else "torch"
    expected = token_preference_loss(logps, *known[1:], loss=loss, columns=columns, backend=backend)
    (expected.loss * 1.7).backward()
    for name in ("loss", "losses", "logps", "rewards"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=2e-5, rtol=1e-5)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        scale = leaf.grad.abs().max()
        torch.testing.assert_close(gradient / scale, leaf.grad / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("of_lists", [False, True], ids=["pairs", "lists"])
def test_micro_batches_add_up(of_lists, device):
    tensors, known, loss, columns = inputs(of_lists, device=device)
    targets, cu_targets, pairs, ref = known
    whole, gradients = run(tensors, known, loss, columns)
    total, added = 0.0, [torch.zeros_like(gradient) for gradient in gradients]
    for row in range(len(pairs)):
        inside = torch.arange(len(pairs)) == row
        part = columns.of_rows(inside, slice(0, len(targets)), 0)
        output, own = run(tensors, (targets, cu_targets, pairs[inside], ref), loss, part, num_pairs=len(pairs), rows=12)
        total += output.loss.detach()
        added = [a + b for a, b in zip(added, own, strict=True)]
    torch.testing.assert_close(total, whole.loss.detach(), atol=1e-6, rtol=1e-6)
    for a, b in zip(added, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_lists_are_kept_together():
    """A list holds its members in one component, also those between its best and its worst; -1 is nobody."""
    cu_targets = list(range(10))
    assert components(cu_targets, [[1, 0, 2, 3], [5, 7, -1, -1]]) == [(0, 4), (4, 5), (5, 8), (8, 9)]
    assert components(cu_targets, [[2, 4, 3, -1], [1, 6, 0, -1], [8, 7, -1, -1]]) == [(0, 7), (7, 9)]


@pytest.mark.parametrize(("needs", "gemms"), list(zip(NEEDS.values(), (3, 2, 2, 1), strict=True)), ids=NEEDS)
def test_a_loss_of_lists_does_the_fewest_gemms(needs, gemms):
    """A budget of 20 rows for 30 targets, whose longest list has 16."""
    tensors, known, loss, columns = inputs(True)
    lists = torch.tensor([[1, 0, 2], [4, 3, -1], [5, 7, 6]], dtype=torch.int32)
    columns = list_columns(token_weights=token_weights())._replace(
        lists=lists, ranks=torch.where(lists < 0, -1, torch.arange(3)).int()
    )
    known = (*known[:2], torch.tensor([[1, 2], [4, 3], [5, 6]], dtype=torch.int32), known[3])
    with Cost() as cost:
        run(tensors, known, loss, columns, needs, rows=20)
    assert cost.gemm_units(sum(LENGTHS), D, V) == gemms


@pytest.mark.parametrize("of_lists", [False, True], ids=["pairs", "lists"])
def test_the_operator_passes_opcheck(of_lists):
    tensors, known, loss, columns = inputs(of_lists)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    arguments = (None, loss.encoded, 4, None, 1.0, 1.0, None, -100, "torch", 9 * V * 4, True, True, False)
    torch.library.opcheck(linear_preference_op, (*leaves, None, *known, *arguments, *columns))


@pytest.mark.slow(8)
@pytest.mark.parametrize("of_lists", [False, True], ids=["pairs", "lists"])
def test_torch_compile_without_a_graph_break(of_lists, device):
    tensors, known, loss, columns = inputs(of_lists, device=device)

    def function(hidden, weight, token_weights):
        own = columns._replace(token_weights=token_weights * 1.0)
        return dpofast.linear_preference_loss(hidden * 2, weight, *known, loss=loss, columns=own).loss * 3

    grads = []
    for compute in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        compute(*leaves, columns.token_weights).backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("of_lists", "change", "message"),
    [
        (False, {"weight": torch.ones(3)}, r"weight: expected shape \(5,\), one a pair, got \(3,\)"),
        (False, {"token_weights": torch.ones(29)}, r"token_weights: expected shape \(30,\), got \(29,\)"),
        (False, {"beta": torch.ones(5, device="meta")}, "beta: expected on cpu like targets, got on meta"),
        (False, {"token_weights": torch.ones(30, device="meta")}, "token_weights: expected on cpu like targets"),
        (True, {"ranks": None}, "lists: expected beside ranks, and both beside scores"),
        (True, {"scores": torch.ones(4, 3)}, r"scores: expected shape \(4, K\), one row a pair, got \(4, 3\)"),
        (True, {"margin": torch.ones(4)}, "margin: kind 'plackett_luce' does not take it"),
        (True, {"lists": torch.full((4, 4), 8), "ranks": torch.zeros(4, 4).int()}, r"sequence numbers in \[0, 8\)"),
    ],
)
def test_columns_that_do_not_fit(of_lists, change, message):
    tensors, known, loss, columns = inputs(of_lists)
    with pytest.raises(ValueError, match=message):
        dpofast.linear_preference_loss(*tensors, *known, loss=loss, columns=columns._replace(**change))
