"""What a loss of one's own is refused for when it is built, what its declaration may say, and which rows it takes."""

import sys

import pytest
import torch
from torch.nn.functional import logsigmoid

from dpofast import Lists, LossOptions, Pairs, PreferenceLoss, preference_kind, preference_loss
from tests.support import own_losses
from tests.support.list_cases import columns_of, random_logps


def margin_of(pairs: Pairs, loss: LossOptions):
    return pairs.beta * (pairs.chosen - pairs.rejected)


def nan_gradient(pairs, loss):
    margin = margin_of(pairs, loss)
    return torch.where(margin > 0, margin.sqrt(), margin)


def hardest(lists: Lists, loss):
    """Reads the 0 that stands where a list has ended."""
    return lists.rewards.amax(1) - lists.rewards[:, 0] + lists.rewards[:, 1]


def double(pairs, loss):
    """float64 whatever it is given."""
    return margin_of(pairs, loss).double()


def only_in_float64(pairs, loss):
    return margin_of(pairs, loss) @ torch.eye(len(pairs.chosen), dtype=torch.float64)


def in_place(pairs, loss):
    with torch.no_grad():
        pairs.policy_chosen.mul_(3)
    return margin_of(pairs, loss)


def in_place_of_the_reference(lists, loss):
    lists.ref.neg_()
    return -(lists.policy - lists.ref)[:, 0]


REFUSED = {
    "raises": (
        lambda pairs, loss: pairs.odds,
        {},
        r"a function of \(Pairs, LossOptions\), and on 4 made-up rows in float64 it rai",
    ),
    "takes one argument": (lambda pairs: -pairs.chosen, {}, "it raised TypeError: .*takes 1 positional argument"),
    "no tensor": (lambda pairs, loss: 1.0, {}, "expected a tensor of one loss a row, got float"),
    "a mean": (lambda pairs, loss: margin_of(pairs, loss).mean(), {}, r"shape \(4,\), got \(\): the mean over rows is"),
    "a column": (lambda pairs, loss: margin_of(pairs, loss)[:, None], {}, r"shape \(4,\), got \(4, 1\)"),
    "another dtype": (lambda pairs, loss: margin_of(pairs, loss).float(), {}, "log-probs' torch.float64, got torch.fl"),
    "float64 always": (double, {}, "expected losses in the log-probs' torch.float32, got torch.float64"),
    "float64 only": (only_in_float64, {}, "on 4 made-up rows in float32 it raised RuntimeError"),
    "in place": (in_place, {}, "writes into policy_chosen, which others read too"),
    "lists, in place": (in_place_of_the_reference, {"lists": True}, "writes into ref, which others read too"),
    "exits": (lambda pairs, loss: sys.exit(2), {}, "made-up rows in float64 it raised SystemExit: 2"),
    "detached": (
        lambda pairs, loss: margin_of(pairs, loss).detach(),
        {},
        "no gradient to the policy's log-probs: comp",
    ),
    "constant": (lambda pairs, loss: 0 * pairs.chosen + 1, {}, "is constant: its gradient .* is 0 on all made-up rows"),
    "of the reference": (lambda pairs, loss: pairs.ref_chosen, {}, "has no gradient to the policy's log-probs"),
    "infinite": (lambda pairs, loss: pairs.chosen / 0, {}, r"expected finite losses, got \[-inf, -inf, inf, inf\]"),
    "NaN gradient": (nan_gradient, {}, "a gradient of NaN or infinity .*: a torch.where hides a branch's value"),
    "lengths": (
        lambda pairs, loss: -pairs.chosen / pairs.chosen_tokens,
        {},
        r"reads token counts, which are NaN unless .* @preference_kind\(lengths=True\)",
    ),
    "reference": (margin_of, {"reference": False}, r"reads the reference's log-probs: declare .*\(reference=True\)"),
    "coupled": (
        lambda pairs, loss: -pairs.chosen + pairs.chosen.mean(),
        {},
        r"couples the rows: a row's loss alone differs .*\(coupled=True\)",
    ),
    "a loss of lists raises": (
        lambda lists, loss: lists.chosen,
        {"lists": True},
        r"a function of \(Lists, LossOptions\), and on 4 made-up rows in float64 it raised AttributeError",
    ),
    "a loss of lists, undeclared": (
        lambda lists, loss: -lists.rewards[:, 0],
        {},
        "it raised AttributeError: 'Pairs' ob",
    ),
    "lists, lengths": (lambda x, loss: -(x.policy / x.tokens)[:, 0], {"lists": True}, "reads token counts"),
    "lists, ended": (hardest, {"lists": True}, "reads places where a list has ended: leave out .* x.member is False"),
    "lists, coupled": (
        lambda x, loss: -x.rewards[:, 0] * x.rewards.amax(),
        {"lists": True},
        "couples the rows: a row's loss alone differs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_loss_is_refused(name):
    function, declared, message = REFUSED[name]
    function = preference_kind(**declared)(lambda *given, of=function: of(*given)) if declared else function
    with pytest.raises(ValueError, match=message) as raised:
        PreferenceLoss(kind=function)
    assert str(raised.value).startswith("kind: tests.losses.test_own_admission:")


def test_it_is_tried_where_nothing_records_gradients():
    with torch.inference_mode():
        assert PreferenceLoss(kind=own_losses.dpo_by_hand, beta=0.7).beta == 0.7


def test_a_loss_is_tried_once():
    calls = []

    def counted(pairs, loss):
        calls.append(len(pairs.chosen))
        return own_losses.dpo_by_hand(pairs, loss)

    loss = PreferenceLoss(kind=counted)
    tried = len(calls)
    PreferenceLoss.decode(loss.encoded)
    assert tried > 1 and len(calls) == tried


def test_each_function_of_a_mix_is_tried():
    with pytest.raises(ValueError, match="expected a tensor of one loss a row, got float"):
        PreferenceLoss(kind=[own_losses.dpo_by_hand, lambda pairs, loss: 1.0])


def test_the_shape_is_checked_at_every_call():
    """The made-up rows are four; with others it may fail."""

    def first_four(pairs, loss):
        return own_losses.dpo_by_hand(pairs, loss)[:4]

    loss = PreferenceLoss(kind=first_four)
    policy, ref = random_logps(10)
    with pytest.raises(ValueError, match=r"first_four: expected one loss a row, shape \(5,\), got \(4,\)"):
        preference_loss(policy, torch.arange(10).view(5, 2), ref, loss=loss)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"smoothing": "[0, 1]"}, r"smoothing: expected one of \['\[0, 0.5\]', .*\] or None, got '\[0, 1\]'"),
        ({"options": ["gamma"]}, r"options: expected some of \['alpha_po_alpha', .*\], got \['gamma'\]"),
        ({"options": "simpo_gamma"}, "options: expected some of .*, got 'simpo_gamma'"),
        ({"scores": True}, "scores: belong to the responses of a list: declare lists=True too"),
        ({"lists": True, "margin": True}, "margin=True: only Pairs have it, and with lists=True"),
        (
            {"lists": True, "divergence": True, "smoothing": "(0, 1)"},
            r"divergence=True, smoothing='\(0, 1\)': only Pairs have it",
        ),
    ],
)
def test_a_declaration_that_there_is_not(declared, message):
    with pytest.raises(ValueError, match=message):
        preference_kind(**declared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": own_losses.dpo_by_hand, "label_smoothing": 0.1}, "label_smoothing=0.1: not for kind 'tests.support"),
        ({"kind": own_losses.sigmoid_by_hand, "label_smoothing": 0.6}, r"a number in \[0, 0.5\] for kind 'tests.sup"),
        ({"kind": own_losses.dpo_by_hand, "simpo_gamma": 0.1}, "simpo_gamma=0.1: not for kind"),
        (
            {"kind": own_losses.dpo_by_hand, "f_divergence_type": "forward_kl"},
            "f_divergence_type='forward_kl': not for",
        ),
        ({"kind": own_losses.infonca_by_hand, "ld_alpha": 0.1}, "ld_alpha=0.1: not for kind"),
    ],
)
def test_options_that_it_has_not_declared(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**options)


def test_a_declaration_without_parentheses():
    with pytest.raises(
        TypeError, match=r"in parentheses: @preference_kind\(...\) or @preference_kind\(\), got <function"
    ):
        preference_kind(own_losses.dpo_by_hand)


def test_a_loss_that_needs_scores_is_refused_on_pairs():
    loss = PreferenceLoss(kind=["sigmoid", own_losses.gap_by_hand])
    columns, pairs = columns_of([([0.75, 0.25], [0, 1])])
    policy, ref = random_logps(2)
    with pytest.raises(
        ValueError, match="scores: kind 'tests.support.own_losses:gap_by_hand' needs scores, and the rows"
    ):
        preference_loss(policy, pairs, ref, loss=loss)
    got = preference_loss(policy, pairs, ref, loss=loss, columns=columns).losses
    margin = 0.1 * ((policy - ref)[0] - (policy - ref)[1])
    torch.testing.assert_close(got, -(logsigmoid(margin) + logsigmoid(margin - 0.5))[None])


def test_a_column_that_it_has_not_declared():
    columns, pairs = columns_of([([1.0, 0.0], [0, 1])], margin=torch.ones(1))
    policy, ref = random_logps(2)
    with pytest.raises(ValueError, match="margin: kind 'tests.support.own_losses:infonca_by_hand' does not take it"):
        preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind=own_losses.infonca_by_hand), columns=columns)
    columns = columns._replace(lists=None, ranks=None, scores=None)
    with_margin = preference_loss(
        policy, pairs, ref, loss=PreferenceLoss(kind=own_losses.sigmoid_by_hand), columns=columns
    )
    x = 0.1 * ((policy - ref)[0] - (policy - ref)[1]) - 1
    torch.testing.assert_close(with_margin.losses, -logsigmoid(x)[None])
