"""Every kind and modifier against reference.py in float64: values, gradients, extremes; what is refused."""

import dataclasses
import math

import pytest
import torch

from dpofast import PreferenceLoss, preference_loss, reference
from dpofast.losses.coefficients import pair_terms
from dpofast.losses.functional import token_preference_loss
from dpofast.losses.kinds import KINDS
from dpofast.losses.options import LossOptions
from dpofast.losses.pairs import StepTotals
from dpofast.losses.sequences import Tokens, pair_logprobs, segment_sums
from tests.support.losses_cases import LENGTHS, LOSSES, PAIRS, plain_options, problem, reference_sums


def ours(tokens, cu_targets, pairs, ref_tokens, log_sum_sq, loss, **options):
    ref = reference_sums(ref_tokens, cu_targets, pairs, loss)
    return token_preference_loss(tokens, cu_targets, pairs, ref, loss=loss, log_sum_sq_probs=log_sum_sq, **options)


def truth(tokens, cu_targets, pairs, ref_tokens, log_sum_sq, options):
    return reference.preference_loss(tokens, cu_targets, pairs, ref_tokens, log_sum_sq_probs=log_sum_sq, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_reference(name):
    loss = PreferenceLoss(**LOSSES[name])
    tokens, *rest = problem()
    tokens.requires_grad_()
    expected = truth(tokens, *rest, LOSSES[name])
    output = ours(tokens, *rest, loss)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.losses.mean(), expected.detach())
    (gradient,) = torch.autograd.grad(output.loss, tokens)
    (expected_gradient,) = torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(gradient, expected_gradient)
    # What the head is given: the same numbers without a graph.
    cu_targets, pairs, ref_tokens, log_sum_sq = rest
    ref = reference_sums(ref_tokens, cu_targets, pairs, loss)
    with torch.inference_mode():
        terms = pair_terms(
            Tokens(tokens.detach(), cu_targets, None, log_sum_sq), pairs, ref, loss, StepTotals(len(pairs)), "torch"
        )
    torch.testing.assert_close(terms.coefficients / len(pairs), expected_gradient)
    torch.testing.assert_close(terms.losses, output.losses)
    assert not terms.losses.requires_grad


def has_constants(name):
    """Whether autograd holds something fixed (weights, KTO's KL, a mean): numerical derivatives do not."""
    loss = PreferenceLoss(**LOSSES[name])
    return loss.use_weighting or {"kto_pair", "beta_dpo"} & set(loss.kinds) or loss.bco_delta != "zero"


@pytest.mark.parametrize("name", [name for name in LOSSES if not has_constants(name)])
def test_derivative_in_float64(name):
    loss = PreferenceLoss(**LOSSES[name])
    tokens, *rest = problem(lengths=[3, 2, 1, 2], pairs=[[0, 1], [0, 2], [3, 1]])
    assert torch.autograd.gradcheck(lambda x: ours(x, *rest, loss).loss, [tokens.requires_grad_()])


# Not IPO of the two divergences whose exponents stop at e^80: its squares pass float32's range.
BOUNDED = [name for name in LOSSES if name not in ("ipo forward_kl", "ipo alpha_divergence")]


@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("name", BOUNDED)
def test_extreme_margins_stay_finite(name, margin):
    loss = PreferenceLoss(**LOSSES[name])
    tokens = torch.tensor([-1e4, -0.5, -0.25, 0.0] if margin < 0 else [-0.25, 0.0, -1e4, -0.5], requires_grad=True)
    cu_targets, pairs = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32)
    output = ours(tokens, cu_targets, pairs, torch.zeros(4), torch.zeros(4), loss)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_one_pair_and_equal_scores(name):
    loss = PreferenceLoss(**LOSSES[name])
    for lengths, pairs in (([3, 5], [[0, 1]]), ([4] * 6, [[0, 1], [2, 3], [4, 5]])):
        _, cu_targets, pairs, *_ = problem(lengths=lengths, pairs=pairs)
        tokens = torch.full((sum(lengths),), -1.5, dtype=torch.float64, requires_grad=True)
        rest = (cu_targets, pairs, tokens.detach(), torch.full_like(tokens, -1.0).detach())
        output, expected = ours(tokens, *rest, loss), truth(tokens, *rest, LOSSES[name])
        torch.testing.assert_close(output.loss, expected)
        if KINDS[loss.kinds[0]].coupled and len(pairs) > 1:
            continue  # ties may be sorted either way
        gradients = [torch.autograd.grad(value, tokens)[0] for value in (output.loss, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", [name for name in LOSSES if not PreferenceLoss(**LOSSES[name]).coupled])
def test_separable_losses_add_up_over_micro_batches(name):
    loss = PreferenceLoss(**LOSSES[name])
    tokens, cu_targets, pairs, ref_tokens, log_sum_sq = problem()
    whole = ours(tokens, cu_targets, pairs, ref_tokens, log_sum_sq, loss)
    totals = {"num_pairs": len(pairs), "num_chosen_tokens": sum(LENGTHS[chosen] for chosen, _ in PAIRS)}
    parts = [ours(tokens, cu_targets, pair[None], ref_tokens, log_sum_sq, loss, **totals) for pair in pairs]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(torch.cat([part.losses for part in parts]), whole.losses)


def sums_only(name):
    loss = PreferenceLoss(**LOSSES[name])
    return loss.ld_alpha is None and not loss.use_weighting


@pytest.mark.parametrize("name", [name for name in LOSSES if sums_only(name)])
def test_sequence_sums_give_the_same(name):
    loss = PreferenceLoss(**LOSSES[name])
    tokens, cu_targets, pairs, ref_tokens, log_sum_sq = problem()
    expected = ours(tokens, cu_targets, pairs, ref_tokens, log_sum_sq, loss)
    sums, ref = segment_sums(tokens, cu_targets), reference_sums(ref_tokens, cu_targets, pairs, loss)
    output = preference_loss(sums, pairs, ref, loss=loss, lengths=cu_targets.diff())
    for field in ("loss", "losses", "logps", "rewards"):
        torch.testing.assert_close(getattr(output, field), getattr(expected, field))


@pytest.mark.parametrize("name", ["sft", "ipo", "ipo ld", "sigmoid_norm weighted", "mix of all modifiers"])
def test_ignored_targets_are_no_tokens(name):
    loss = PreferenceLoss(**LOSSES[name])
    tokens, cu_targets, pairs, ref_tokens, log_sum_sq = problem()
    expected = ours(tokens, cu_targets, pairs, ref_tokens, log_sum_sq, loss)
    # Two ignored targets before each sequence's own: their log-probs and statistics are 0.
    lengths = cu_targets.diff() + 2
    counted = torch.cat([torch.tensor([False, False, *[True] * n]) for n in LENGTHS])
    longer = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

    def stretch(values):
        return torch.zeros(len(counted), dtype=values.dtype).masked_scatter(counted, values)

    ref = None
    if loss.needs_reference:
        ref = reference_sums(ref_tokens, cu_targets, pairs, loss)
    output = token_preference_loss(
        stretch(tokens), longer, pairs, ref, loss=loss, log_sum_sq_probs=stretch(log_sum_sq) + 1, counted=counted
    )
    wanted = token_preference_loss(tokens, cu_targets, pairs, ref, loss=loss, log_sum_sq_probs=log_sum_sq + 1)
    torch.testing.assert_close(output.loss, wanted.loss)
    assert expected.loss.isfinite()


def test_a_reference_that_a_kind_ignores_changes_only_the_rewards():
    for kind in ("simpo", "orpo", "cpo", "sft"):
        loss = PreferenceLoss(**plain_options(kind))
        tokens, cu_targets, pairs, ref_tokens, _ = problem()
        ref = reference.sequence_logprobs(ref_tokens, cu_targets)
        without = token_preference_loss(tokens, cu_targets, pairs, loss=loss)
        beside = token_preference_loss(tokens, cu_targets, pairs, ref, loss=loss)
        assert torch.equal(without.loss, beside.loss)
        torch.testing.assert_close(without.rewards, 0.3 * without.logps)
        torch.testing.assert_close(beside.rewards, 0.3 * (without.logps - ref))


def test_bco_shifts_by_the_mean_of_all_rewards_so_far():
    loss = PreferenceLoss(kind="bco_pair", bco_delta="running_mean", beta=0.3)
    tokens, cu_targets, pairs, ref_tokens, log_sum_sq = problem()
    earlier = torch.tensor([7.0, 10.0], dtype=torch.float64)
    output = ours(tokens, cu_targets, pairs, ref_tokens, log_sum_sq, loss, earlier_rewards=earlier)
    rewards = output.of_pairs("rewards", pairs)
    shift = (7.0 + rewards.sum()) / (10 + 2 * len(pairs))
    expected = -(rewards[:, 0] - shift).sigmoid().log() - (shift - rewards[:, 1]).sigmoid().log()
    torch.testing.assert_close(output.losses, expected)


def test_ld_alpha_by_hand():
    tokens = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    cu_targets, pairs = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32)
    sums = pair_logprobs(tokens, cu_targets, pairs, ld_alpha=0.5)
    assert sums.tolist() == [[-1.0 - 2.0 - 0.5 * 3.0, -9.0]]


def test_preference_loss_has_the_fields_of_loss_options_and_documents_each():
    names = [field.name for field in dataclasses.fields(LossOptions)]
    assert [field.name for field in dataclasses.fields(PreferenceLoss)] == [*names, "encoded"]
    assert [name for name in names if f" {name}: " not in PreferenceLoss.__doc__] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sigmod"}, r"kind: expected one of \['alpha_po', .*'sppo_hard'\], or several of them, got 'sigmod'"),
        ({"kind": ("sigmoid", "dpo")}, "kind: expected one of"),
        ({"kind": ()}, "kind: expected one of"),
        ({"kind": ("sigmoid", "sft"), "weights": (1.0,)}, "weights: expected 2 finite numbers, one a kind"),
        ({"kind": ("sigmoid", "sft"), "weights": (1.0, math.inf)}, "weights: expected 2 finite numbers"),
        ({"beta": 0.0}, "beta: expected a positive finite number, got 0.0"),
        ({"beta": -1.0}, "beta: expected a positive finite number, got -1.0"),
        ({"beta": float("nan")}, "beta: expected a positive"),
        ({"label_smoothing": 0.6}, r"label_smoothing: expected a number in \[0, 0.5\] for kind 'sigmoid', got 0.6"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"kind": "robust", "label_smoothing": 0.5}, r"label_smoothing: expected a number in \[0, 0.5\) for kind 'rob"),
        (
            {"kind": "exo_pair"},
            r"label_smoothing: expected a number in \(0, 1\) for kind 'exo_pair' \(the EXO paper takes 1e-3\), got 0.0",
        ),
        ({"kind": 3}, "kind: expected a name or a list of names, got 3"),
        ({"weights": 1.0}, "weights: expected a list of numbers, one a kind, got 1.0"),
        ({"weights": {"sigmoid": 1.0}}, "weights: expected a list of numbers"),
        ({"beta": "0.1"}, "beta: expected a number, got '0.1'"),
        ({"beta": True}, "beta: expected a number, got True"),
        ({"use_weighting": "no"}, "use_weighting: expected True or False, got 'no'"),
        ({"kind": "exo_pair", "label_smoothing": 1.0}, r"label_smoothing: expected a number in \(0, 1\)"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1: not for kind 'hinge'; the kinds that"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: expected one of"),
        ({"kind": "nca_pair", "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl': not for kind 'nca"),
        ({"kind": "sft", "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl': not for kind 'sft'"),
        ({"kind": ("sigmoid", "aot"), "f_divergence_type": "forward_kl"}, r"not for kind \('sigmoid', 'aot'\)"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef=0.3: only for f_divergence_type='alpha_div"),
        ({"f_alpha_divergence_coef": math.inf}, "f_alpha_divergence_coef: expected a finite number"),
        ({"ld_alpha": 1.5}, r"ld_alpha: expected a number in \[0, 1\] or None, got 1.5"),
        ({"kind": "sft", "ld_alpha": 0.5}, "ld_alpha=0.5: not for kind 'sft'"),
        ({"kind": "aot", "use_weighting": True}, "use_weighting=True: not for kind 'aot'"),
        ({"kind": "orpo", "rpo_alpha": 1.0}, "rpo_alpha=1.0: not for kind 'orpo'"),
        ({"rpo_alpha": -1.0}, "rpo_alpha: expected 0 or more, or None, got -1.0"),
        ({"ipo_average": False}, "ipo_average=False: not for kind 'sigmoid'; the kinds that take it are ipo"),
        ({"bco_delta": "running_mean"}, "bco_delta='running_mean': not for kind 'sigmoid'"),
        ({"kind": "bco_pair", "bco_delta": "mean"}, "bco_delta: expected 'zero' or 'running_mean', got 'mean'"),
        ({"discopop_tau": 1.0}, "discopop_tau=1.0: not for kind 'sigmoid'"),
        ({"kind": "discopop", "discopop_tau": 0.0}, "discopop_tau: expected a positive finite number, got 0.0"),
        ({"kind": "simpo", "simpo_gamma": math.nan}, "simpo_gamma: expected a finite number"),
        ({"kind": "cpo", "cpo_alpha": -1.0}, "cpo_alpha: expected 0 or more, got -1.0"),
        ({"alpha_po_alpha": 0.5}, "alpha_po_alpha=0.5: not for kind 'sigmoid'; the kinds that take it are alpha_po$"),
        ({"kind": "alpha_po", "alpha_po_alpha": math.inf}, "alpha_po_alpha: expected a finite number, got inf"),
        ({"dpop_lambda": 1.0}, "dpop_lambda=1.0: not for kind 'sigmoid'; the kinds that take it are dpop$"),
        ({"kind": "dpop", "dpop_lambda": -1.0}, "dpop_lambda: expected 0 or more, got -1.0"),
        ({"beta_dpo_alpha": 0.1}, "beta_dpo_alpha=0.1: not for kind 'sigmoid'"),
        ({"kind": "beta_dpo", "beta_dpo_alpha": -0.1}, "beta_dpo_alpha: expected 0 or more, got -0.1"),
        ({"beta_dpo_threshold": 0.1}, "beta_dpo_threshold=0.1: not for kind 'sigmoid'"),
        ({"kind": "beta_dpo", "beta_dpo_threshold": math.nan}, "beta_dpo_threshold: expected a finite number, got nan"),
        (
            {"kind": "plackett_luce", "score_temperature": 0.5},
            "score_temperature=0.5: not for kind 'plackett_luce'; the kinds that take it are infonca, nca, lipo_lambda",
        ),
        ({"kind": "nca", "score_temperature": 0.0}, "score_temperature: expected a positive finite number, got 0.0"),
        ({"kind": "nca", "ld_alpha": 0.5}, "ld_alpha=0.5: not for kind 'nca'; the kinds that take it are sigmoid, .*"),
        ({"kind": ("sigmoid", "infonca"), "ld_alpha": 0.5}, r"ld_alpha=0.5: not for kind \('sigmoid', 'infonca'\)"),
        ({"kind": "softmax_dpo", "use_weighting": True}, "use_weighting=True: not for kind 'softmax_dpo'"),
        ({"kind": "lipo_lambda", "label_smoothing": 0.1}, "label_smoothing=0.1: not for kind 'lipo_lambda'"),
        ({"kind": "dpop", "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl': not for kind 'dpop'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**options)


def test_a_loss_reads_back_from_what_operators_are_told():
    for options in LOSSES.values():
        loss = PreferenceLoss(**options)
        assert PreferenceLoss.decode(loss.encoded) == loss


def arguments(**change):
    tokens, cu_targets, pairs, ref_tokens, _ = problem()
    ref = reference.sequence_logprobs(ref_tokens, cu_targets)
    return {"token_logps": tokens, "cu_targets": cu_targets, "pairs": pairs, "ref_logps": ref, **change}


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"ref_logps": None}, "ref_logps: kind 'sigmoid' needs the reference's log-probs, got None"),
        ({}, {"ref_logps": torch.zeros(7)}, r"ref_logps: expected shape \(8,\), one a sequence, got \(7,\)"),
        ({"ld_alpha": 0.5}, {}, r"ref_logps: expected shape \(5, 2\), with ld_alpha, got \(8,\)"),
        ({"use_weighting": True}, {}, "log_sum_sq_probs: use_weighting of kind 'sigmoid' needs them, got None"),
        (
            {"use_weighting": True},
            {"log_sum_sq_probs": torch.zeros(3)},
            r"log_sum_sq_probs: expected shape \(30,\), got \(3,\)",
        ),
        ({}, {"counted": torch.ones(3, dtype=torch.bool)}, r"counted: expected shape \(30,\), got \(3,\)"),
        ({}, {"pairs": torch.tensor([[0, 8]])}, r"pairs: expected sequence numbers in \[0, 8\)"),
        ({}, {"num_pairs": 0}, "num_pairs: expected an integer of 1 or more, got 0"),
        ({}, {"num_pairs": -1}, "num_pairs: expected an integer of 1 or more, got -1"),
        ({"kind": "sft"}, {"num_chosen_tokens": 0}, "num_chosen_tokens: expected an integer of 1 or more, got 0"),
    ],
)
def test_bad_arguments(options, change, message):
    with pytest.raises(ValueError, match=message):
        token_preference_loss(**arguments(**change), loss=PreferenceLoss(**options))


def test_what_sums_cannot_give_is_refused():
    logps, pairs = torch.zeros(4), torch.tensor([[0, 1]])
    for options in ({"ld_alpha": 0.5}, {"use_weighting": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: .*for kind 'sigmoid'.*token_preference_loss"):
            ref = torch.zeros(1, 2) if "ld_alpha" in options else torch.zeros(4)
            preference_loss(logps, pairs, ref, loss=PreferenceLoss(**options))
    with pytest.raises(ValueError, match=r"lengths: kind 'ipo' divides by them: expected shape \(4,\), got None"):
        preference_loss(logps, pairs, torch.zeros(4), loss=PreferenceLoss(kind="ipo"))


@pytest.mark.parametrize("loss", ["sigmoid", {"kind": "sigmoid"}])
def test_a_loss_by_another_name_is_refused(loss):
    with pytest.raises(TypeError, match=r"loss: expected a PreferenceLoss\(kind=...\), got"):
        token_preference_loss(**arguments(), loss=loss)
