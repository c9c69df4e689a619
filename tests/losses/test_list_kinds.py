"""The losses of lists against reference.list_loss in float64: ragged lists, ties, extremes, lists of two."""

import math

import pytest
import torch

from bench.cost import Cost
from dpofast import PreferenceLoss, linear_preference_loss, preference_loss, reference
from dpofast.losses.functional import token_preference_loss
from dpofast.losses.kinds import KINDS
from dpofast.losses.list_kinds import MOST_EXPONENT, MOST_TIED
from dpofast.losses.sequences import segment_sums
from tests.support.list_cases import columns_of, dense, random_lists, random_logps
from tests.support.losses_cases import plain_options

LISTS = [name for name, kind in KINDS.items() if kind.lists]


def scored(kind):
    """Whether the loss reads scores, and may be given them: it needs them for lists."""
    return KINDS[kind].scores


def truth(kind, lists, policy, ref, options):
    """(P,) losses by the reference, list by list."""
    start, losses = 0, []
    for scores, ranks in lists:
        part = slice(start, start + len(ranks))
        given = scores if scored(kind) else None
        losses.append(reference.list_loss(kind, policy[part], ref[part], ranks, given, **options))
        start = part.stop
    return torch.stack(losses)


def own_options(kind):
    return {name: value for name, value in plain_options(kind).items() if name != "kind"}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", LISTS)
def test_value_and_gradient_of_ragged_lists_with_ties(kind, seed):
    lists = random_lists(seed)
    columns, pairs = columns_of(lists, scores=scored(kind))
    policy, ref = random_logps(sum(len(ranks) for _, ranks in lists), seed)
    policy.requires_grad_()
    loss = PreferenceLoss(**plain_options(kind))
    output = preference_loss(policy, pairs, ref, loss=loss, columns=columns)
    expected = truth(kind, lists, policy, ref, own_options(kind))
    torch.testing.assert_close(output.losses, expected.detach(), atol=1e-12, rtol=1e-7)
    (gradient,) = torch.autograd.grad(output.loss, policy)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), policy)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("kind", LISTS)
def test_derivative_in_float64(kind):
    lists = random_lists(3)
    columns, pairs = columns_of(lists, scores=scored(kind))
    policy, ref = random_logps(sum(len(ranks) for _, ranks in lists))
    loss = PreferenceLoss(**plain_options(kind))

    def function(x):
        return preference_loss(x, pairs, ref, loss=loss, columns=columns).loss

    assert torch.autograd.gradcheck(function, [policy.requires_grad_()])


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("kind", ["plackett_luce", "infonca", "softmax_dpo"])
def test_of_two_responses_it_is_dpo(kind, beta):
    policy, ref = random_logps(8, spread=30.0)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [7, 6]], dtype=torch.int32)
    got = preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind=kind, beta=beta)).losses
    dpo = preference_loss(policy, pairs, ref, loss=PreferenceLoss(beta=beta)).losses
    torch.testing.assert_close(got, dpo, atol=1e-12, rtol=0)


def test_of_two_responses_nca_is_nca_pair():
    policy, ref = random_logps(4)
    pairs = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    got, expected = (
        preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind=k)).losses for k in ("nca", "nca_pair")
    )
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_of_two_responses_lipo_is_dpo_times_a_constant():
    """2^1 − 2^0 = 1, and 1/log 2 − 1/log 3 whatever the order."""
    policy, ref = random_logps(4)
    pairs = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
    got, dpo = (
        preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind=k)).losses for k in ("lipo_lambda", "sigmoid")
    )
    torch.testing.assert_close(got, dpo * (1 / math.log(2) - 1 / math.log(3)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LISTS)
def test_extreme_rewards_stay_finite(kind, dtype):
    """±1e4 on every place of lists of two and five, with ties."""
    lists = [([1.0, 0.0], [0, 1]), ([1.0, 1.0, 0.5, 0.5, 0.0], [0, 0, 1, 1, 2])]
    columns, pairs = columns_of(lists, scores=scored(kind))
    for seed in range(8):
        signs = torch.randint(2, (7,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        policy = (1e4 * signs).to(dtype).requires_grad_()
        loss = PreferenceLoss(kind=kind, beta=1.0)
        output = preference_loss(policy, pairs, torch.zeros(7, dtype=dtype), loss=loss, columns=columns)
        output.loss.backward()
        assert output.losses.isfinite().all() and policy.grad.isfinite().all()


@pytest.mark.parametrize("kind", LISTS)
def test_large_scores_and_temperatures_stay_finite(kind):
    highest = MOST_EXPONENT if kind == "lipo_lambda" else 1e4
    lists = [([highest, 20.0, -1e4], [0, 1, 2])]
    columns, pairs = columns_of(lists, scores=scored(kind))
    policy = torch.tensor([-3.0, -2.0, -4.0], requires_grad=True)
    output = preference_loss(policy, pairs, torch.zeros(3), loss=PreferenceLoss(kind=kind), columns=columns)
    output.loss.backward()
    assert output.loss.isfinite() and policy.grad.isfinite().all()


def test_gains_that_do_not_train_are_refused():
    columns, pairs = columns_of([([1.0, 0.0], [0, 1]), ([100.0, 90.0, 10.0, 1.0], [0, 1, 2, 3])])
    policy, ref = random_logps(6)
    message = r"scores: lipo_lambda's gains .* exponents of up to 30, got 100/1; raise --score_temperature .* in list 1"
    with pytest.raises(ValueError, match=message):
        preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind="lipo_lambda"), columns=columns)
    loss = PreferenceLoss(kind="lipo_lambda", score_temperature=100.0)
    got = preference_loss(policy, pairs, ref, loss=loss, columns=columns).losses
    by_hundredths = columns._replace(scores=columns.scores / 100)
    expected = preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind="lipo_lambda"), columns=by_hundredths)
    torch.testing.assert_close(got, expected.losses)


@pytest.mark.parametrize("kind", LISTS)
def test_the_order_of_tied_responses_changes_nothing(kind):
    lists = [([0.9, 0.5, 0.5, 0.5, 0.1], [0, 1, 1, 1, 2]), ([0.5, 0.5, 0.0], [0, 0, 1])]
    columns, pairs = columns_of(lists, scores=scored(kind))
    policy, ref = random_logps(8)
    loss = PreferenceLoss(**plain_options(kind))
    losses = preference_loss(policy, pairs, ref, loss=loss, columns=columns).losses
    order = torch.tensor([0, 3, 1, 2, 4, 6, 5, 7])
    again = preference_loss(policy[order], pairs, ref[order], loss=loss, columns=columns).losses
    torch.testing.assert_close(again, losses, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", LISTS)
def test_wider_padding_changes_nothing(kind):
    lists = random_lists(2)
    policy, ref = random_logps(sum(len(ranks) for _, ranks in lists))
    policy.requires_grad_()
    loss, results = PreferenceLoss(**plain_options(kind)), []
    for width in (0, 9):
        columns, pairs = columns_of(lists, width=width, scores=scored(kind))
        output = preference_loss(policy, pairs, ref, loss=loss, columns=columns)
        results.append((output.losses, *torch.autograd.grad(output.loss, policy)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_one_rank_says_nothing(kind):
    """All tied: no pair, no worse response; likelihoods that move alike for all members of the list."""
    columns, pairs = columns_of([([0.5, 0.5, 0.5], [0, 0, 0])], scores=scored(kind))
    policy, ref = random_logps(3)
    policy.requires_grad_()
    output = preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind=kind), columns=columns)
    (gradient,) = torch.autograd.grad(output.loss, policy)
    assert gradient.isfinite().all()
    if kind in ("softmax_dpo", "lipo_lambda"):
        assert output.loss == 0 and not gradient.any()
    expected = truth(kind, [([0.5] * 3, [0] * 3)], policy, ref, {})
    torch.testing.assert_close(output.losses, expected.detach(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", LISTS)
def test_columns_of_lists(kind):
    """A beta and a weight of each list; a weight of 0 leaves it out but for the divisor."""
    lists = random_lists(4)
    betas, weights = torch.linspace(0.1, 0.8, len(lists)), torch.linspace(0, 2, len(lists))
    columns, pairs = columns_of(lists, scores=scored(kind), beta=betas, weight=weights)
    policy, ref = random_logps(sum(len(ranks) for _, ranks in lists))
    loss = PreferenceLoss(**plain_options(kind))
    output = preference_loss(policy, pairs, ref, loss=loss, columns=columns)
    options = own_options(kind)
    each = [truth(kind, lists, policy, ref, {**options, "beta": float(beta)}) for beta in betas]
    expected = torch.stack([each[row][row] for row in range(len(lists))]) * weights
    torch.testing.assert_close(output.losses, expected, atol=1e-6, rtol=1e-6)
    assert output.losses[0] == 0


@pytest.mark.parametrize("kind", LISTS)
def test_a_mix_with_a_loss_of_pairs_sees_best_and_worst(kind):
    lists = random_lists(5)
    columns, pairs = columns_of(lists, scores=scored(kind))
    policy, ref = random_logps(sum(len(ranks) for _, ranks in lists))
    own = own_options(kind)
    mix = PreferenceLoss(kind=(kind, "sigmoid"), weights=(0.5, 2.0), **own)
    output = preference_loss(policy, pairs, ref, loss=mix, columns=columns)
    dpo, _ = reference.sigmoid_loss(policy, pairs, ref, beta=own["beta"])
    torch.testing.assert_close(output.losses, 0.5 * truth(kind, lists, policy, ref, own) + 2 * dpo)


@pytest.mark.parametrize("kind", LISTS)
def test_from_token_log_probs(kind):
    lists = random_lists(6)
    columns, pairs = columns_of(lists, scores=scored(kind))
    count = sum(len(ranks) for _, ranks in lists)
    lengths = torch.randint(1, 6, (count,), generator=torch.Generator().manual_seed(0))
    cu_targets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    tokens = -torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, ref = random_logps(count)
    loss = PreferenceLoss(**plain_options(kind))
    got = token_preference_loss(tokens, cu_targets, pairs, ref, loss=loss, columns=columns)
    expected = truth(kind, lists, segment_sums(tokens, cu_targets), ref, own_options(kind))
    torch.testing.assert_close(got.losses, expected)


@pytest.mark.parametrize("kind", [kind for kind in LISTS if KINDS[kind].scores])
def test_lists_without_the_scores_that_a_kind_needs_are_refused(kind):
    columns, pairs = columns_of(random_lists(), scores=False)
    policy, ref = random_logps(31)
    with pytest.raises(ValueError, match=f"scores: kind '{kind}' needs the scores of a list's responses"):
        preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind=kind), columns=columns)


def test_plackett_luce_refuses_more_ties_than_it_can_order():
    count = MOST_TIED + 1
    columns, pairs = columns_of([([0.5] * count, [0] * count)], scores=False)
    policy, ref = random_logps(count)
    with pytest.raises(ValueError, match="plackett_luce takes up to 8 tied responses, got 9: rank them, or leave some"):
        preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind="plackett_luce"), columns=columns)


def test_dense_ranks_of_scores():
    assert dense([0.9, 0.5, 0.5, 0.1]) == [0, 1, 1, 2]


@pytest.mark.parametrize("kind", LISTS)
def test_ragged_lists_cost_three_gemms_and_equal_the_losses_of_their_tokens(kind):
    lists = random_lists(7, sizes=(2, 4, 3))
    columns, pairs = columns_of(lists, scores=scored(kind))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 2, 4, 1, 2, 3, 2, 2])
    cu_targets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    hidden, weight = torch.randn(20, 8, generator=generator), torch.randn(31, 8, generator=generator)
    targets, ref = torch.randint(31, (20,), generator=generator), random_logps(9)[1].float()
    loss, results = PreferenceLoss(**plain_options(kind)), []

    def by_the_head(h, w):
        known = {"loss": loss, "columns": columns, "max_logits_bytes": 19 * 31 * 4}
        return linear_preference_loss(h, w, targets, cu_targets, pairs, ref, **known)

    def by_tokens(h, w):
        tokens = reference.linear_logprobs(h, w, targets)
        return token_preference_loss(tokens, cu_targets, pairs, ref, loss=loss, columns=columns)

    for function in (by_the_head, by_tokens):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with Cost() as cost:
            output = function(*leaves)
            output.loss.backward()
        assert cost.gemm_units(20, 8, 31) == 3
        results.append((output.losses, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-4)
