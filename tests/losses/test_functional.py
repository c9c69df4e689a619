"""preference_loss against the reference, its derivative, its edges and its errors."""

import math

import pytest
import torch

from dpofast import PreferenceLoss, preference_loss, reference
from dpofast.losses.functional import token_preference_loss
from dpofast.losses.sequences import segment_sums


def inputs(dtype=torch.float32):
    logps = torch.tensor([-10.0, -12.0, -9.0, -30.0], dtype=dtype)
    ref = torch.tensor([-11.0, -11.0, -11.0, -29.0], dtype=dtype)
    pairs = torch.tensor([[0, 1], [2, 3], [0, 3]], dtype=torch.int32)
    return logps, pairs, ref


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.05, 1.0, 5.0])
def test_sigmoid_matches_the_reference(beta, label_smoothing):
    logps, pairs, ref = inputs(torch.float64)
    logps.requires_grad_()
    output = preference_loss(logps, pairs, ref, loss=PreferenceLoss(beta=beta, label_smoothing=label_smoothing))
    losses, rewards = reference.sigmoid_loss(logps, pairs, ref, beta=beta, label_smoothing=label_smoothing)
    torch.testing.assert_close(output.losses, losses.detach())
    torch.testing.assert_close(output.loss, losses.mean())
    torch.testing.assert_close(output.rewards, rewards)
    (ours,) = torch.autograd.grad(output.loss, logps)
    (theirs,) = torch.autograd.grad(losses.mean(), logps)
    torch.testing.assert_close(ours, theirs)


def test_equation_7_by_hand():
    output = preference_loss(torch.tensor([-10.0, -12.0]), torch.tensor([[0, 1]]), torch.tensor([-11.0, -11.0]))
    # margin = 0.1·((−10 + 11) − (−12 + 11)) = 0.2
    assert math.isclose(output.loss.item(), math.log(1 + math.exp(-0.2)), rel_tol=1e-6)
    torch.testing.assert_close(output.rewards, torch.tensor([0.1, -0.1]))


def test_micro_batches_add_up_to_the_step():
    logps, pairs, ref = inputs()
    whole = preference_loss(logps, pairs, ref).loss
    parts = [preference_loss(logps, pairs[i : i + 1], ref, num_pairs=len(pairs)).loss for i in range(len(pairs))]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_extreme_margins_stay_finite(margin, label_smoothing):
    logps = torch.tensor([margin * 10, 0.0], requires_grad=True)
    loss = PreferenceLoss(beta=0.1, label_smoothing=label_smoothing)
    output = preference_loss(logps, torch.tensor([[0, 1]]), torch.zeros(2), loss=loss)
    output.loss.backward()
    assert torch.isfinite(output.loss) and torch.isfinite(logps.grad).all()
    expected = 1e4 * (label_smoothing if margin > 0 else 1 - label_smoothing)
    assert math.isclose(output.loss.item(), expected, rel_tol=1e-6)


def test_derivative_in_float64():
    logps, pairs, ref = inputs(torch.float64)

    def loss(x):
        return preference_loss(x, pairs, ref, loss=PreferenceLoss(beta=0.7, label_smoothing=0.1)).loss

    assert torch.autograd.gradcheck(loss, [logps.requires_grad_()])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_from_tokens_to_the_loss(backend, label_smoothing, device):
    cu_targets = torch.tensor([0, 3, 4, 204, 206], dtype=torch.int32)
    _, pairs, ref = inputs()
    tokens, ref = -torch.rand(206).to(device), ref.to(device)
    loss = PreferenceLoss(beta=0.3, label_smoothing=label_smoothing)
    leaf, wide = tokens.clone().requires_grad_(), tokens.double().requires_grad_()
    output = token_preference_loss(leaf, cu_targets, pairs, ref, loss=loss, num_pairs=5, backend=backend)
    (output.loss * 2).backward()
    sums = reference.sequence_logprobs(wide, cu_targets)
    losses, rewards = reference.sigmoid_loss(sums, pairs, ref.double(), beta=0.3, label_smoothing=label_smoothing)
    (losses.sum() / 5 * 2).backward()
    torch.testing.assert_close(output.loss.double(), losses.sum() / 5, atol=0, rtol=1e-6)
    torch.testing.assert_close(output.losses.double(), losses.detach(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(output.logps.double(), sums.detach(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(output.rewards.double(), rewards, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, atol=1e-6, rtol=1e-5)


def test_segment_sums_add_in_float64():
    tokens = torch.cat([torch.tensor([-1e6]), torch.full((5000,), -0.01)])
    sums = segment_sums(tokens, torch.tensor([0, 5001, 5001], dtype=torch.int32))
    torch.testing.assert_close(sums, torch.tensor([-1e6 - 50.0, 0.0]), atol=0.07, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": torch.zeros(2, 2)}, r"logps: expected a float tensor \(S,\)"),
        ({"pairs": torch.zeros(3, dtype=torch.int32)}, r"pairs: expected an integer tensor \(P, 2\)"),
        ({"pairs": torch.zeros(0, 2, dtype=torch.int32)}, "pairs: expected at least one pair"),
        ({"pairs": torch.tensor([[0, 4]])}, r"sequence numbers in \[0, 4\)"),
        ({"pairs": torch.tensor([[-1, 2]])}, r"sequence numbers in \[0, 4\)"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps: expected shape \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    logps, pairs, ref = inputs()
    with pytest.raises(ValueError, match=message):
        preference_loss(**{"logps": logps, "pairs": pairs, "ref_logps": ref, **change})


@pytest.mark.parametrize(
    ("options", "per_token"),
    [
        ({"kind": "sigmoid"}, False),
        ({"kind": "sigmoid_norm"}, True),
        ({"kind": ("simpo", "sft")}, True),
        ({"kind": ("sigmoid", "sigmoid_norm")}, False),
        ({"kind": "ipo"}, True),
        ({"kind": "ipo", "ipo_average": False}, False),
        ({"kind": "sft"}, False),
    ],
)
def test_which_losses_compare_log_probs_per_token(options, per_token):
    assert PreferenceLoss(**options).per_token is per_token


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # ((−10 + 11) − (−12 + 11) − 1 / (2·0.5))²
        (PreferenceLoss(kind="ipo", ipo_average=False, beta=0.5), 1.0),
        # −ln σ(0.5·(−10 + 12)), without the NLL term
        (PreferenceLoss(kind="cpo", cpo_alpha=0.0, beta=0.5), math.log(1 + math.exp(-1.0))),
    ],
    ids=["ipo, summed", "cpo without its NLL term"],
)
def test_an_option_that_divides_by_nothing_needs_no_lengths(loss, expected):
    output = preference_loss(
        torch.tensor([-10.0, -12.0]), torch.tensor([[0, 1]]), torch.tensor([-11.0, -11.0]), loss=loss
    )
    assert math.isclose(output.loss.item(), expected, rel_tol=1e-6)
