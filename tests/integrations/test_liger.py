"""The drop-in for LigerFusedLinearDPOLoss against liger-kernel 0.8.5 itself."""

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as Liger

from dpofast import linear_logprobs
from dpofast.integrations.liger import LOSS_TYPES, LigerFusedLinearDPOLoss
from dpofast.losses.kinds import KINDS

pytestmark = pytest.mark.slow(30)

KINDS_HERE = [kind for kind in LOSS_TYPES if kind in KINDS]
# These have no value at 0, or mean something else there.
SMOOTHING = {"exo_pair": 1e-2, "robust": 0.2}
PAIRS, WIDTH, D, V = 3, 7, 8, 31


def tensors(*, bias=True, dtype=torch.float32):
    """weight, input, target, bias, and the reference's input, weight and bias, in forward's order."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    target = torch.randint(0, V, (2 * PAIRS, WIDTH), generator=generator)
    for row, length in enumerate((2, 5, 3, 0, 6, 1)):  # prompts of different lengths
        target[row, :length] = -100
    leaves = [random(V, D, scale=0.4).requires_grad_(), random(2 * PAIRS, WIDTH, D).requires_grad_(), target]
    leaves.append(random(V, scale=0.3).requires_grad_() if bias else None)
    return [*leaves, random(2 * PAIRS, WIDTH, D), random(V, D, scale=0.4), random(V, scale=0.3) if bias else None]


def run(loss, arguments, upstream=1.0, **extra):
    """Loss, metrics and gradients of weight, input and bias."""
    value, metrics = loss(*arguments, **extra)
    (value * upstream).backward()
    gradients = [leaf.grad for leaf in (arguments[0], arguments[1], arguments[3]) if leaf is not None]
    return value.detach(), metrics, gradients


def assert_equal(ours, theirs, atol=1e-5):
    for mine, his in zip((ours[0], *ours[1], *ours[2]), (theirs[0], *theirs[1], *theirs[2]), strict=True):
        torch.testing.assert_close(mine, his.to(mine.dtype), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("nll", [True, False])
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_equals_liger(kind, nll, average, bias):
    options = {
        "loss_type": kind,
        "beta": 0.3,
        "alpha": 0.7,
        "compute_nll_loss": nll,
        "average_log_prob": average,
        "label_smoothing": SMOOTHING.get(kind, 0.0),
    }
    ours = run(LigerFusedLinearDPOLoss(**options), tensors(bias=bias), upstream=2.0)
    theirs = run(Liger(**options, compiled=False), tensors(bias=bias), upstream=2.0)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_without_a_reference(kind):
    options = {"loss_type": kind, "use_ref_model": False, "label_smoothing": SMOOTHING.get(kind, 0.0)}
    assert_equal(
        run(LigerFusedLinearDPOLoss(**options), tensors()[:4]), run(Liger(**options, compiled=False), tensors()[:4])
    )


@pytest.mark.parametrize("average", [True, False])
def test_cached_reference_log_probs(average):
    arguments = tensors()
    *_, target, _, ref_input, ref_weight, ref_bias = arguments
    logps = linear_logprobs(ref_input.flatten(0, 1), ref_weight, target.flatten(), bias=ref_bias).logps
    sums = logps.view(target.shape).sum(1)
    chosen, rejected = (sums / (target != -100).sum(1) if average else sums).chunk(2)
    loss = LigerFusedLinearDPOLoss(average_log_prob=average)
    cached = run(loss, tensors()[:4], ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    assert_equal(cached, run(loss, arguments), atol=1e-6)


def test_label_smoothing_counts():
    """liger drops it for sigmoid: the smoothed loss is what conservative DPO says of the same log-probs."""
    smoothing, beta = 0.2, 0.3
    value, metrics, _ = run(LigerFusedLinearDPOLoss(beta=beta, label_smoothing=smoothing), tensors())
    margin = metrics[5] - metrics[6]
    logsigmoid = torch.nn.functional.logsigmoid
    expected = (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean()
    torch.testing.assert_close(value, expected)
    plain, _, _ = run(Liger(beta=beta, label_smoothing=smoothing, compiled=False), tensors())
    assert abs(plain - expected) > 1e-3


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("nll", [True, False])
def test_rows_without_labels_are_no_nan(nll, average):
    """liger divides by their length."""
    loss = LigerFusedLinearDPOLoss(average_log_prob=average, compute_nll_loss=nll)
    for empty in ([1], [4], [0, 1, 2], [0, 1, 2, 3, 4, 5]):
        arguments = tensors()
        arguments[2][empty] = -100
        value, metrics, gradients = run(loss, arguments)
        assert all(torch.isfinite(x).all() for x in (value, *metrics, *gradients))
        assert (gradients[1][empty] == 0).all()
        assert all(metrics[row >= PAIRS][row % PAIRS] == 0 for row in empty)


def test_bfloat16_is_as_close_to_float32_as_ligers():
    truth = run(Liger(compiled=False), tensors())
    ours = run(LigerFusedLinearDPOLoss(), tensors(dtype=torch.bfloat16))
    theirs = run(Liger(compiled=False), tensors(dtype=torch.bfloat16))
    for mine, his, right in zip(*((run[0], *run[1][:2]) for run in (ours, theirs, truth)), strict=True):
        assert (mine - right).abs().max() <= 2 * (his - right).abs().max() + 1e-3


def test_a_frozen_head_and_no_gradient_at_all():
    arguments = tensors()
    arguments[0].requires_grad_(False)
    arguments[3].requires_grad_(False)
    value, _, gradients = run(LigerFusedLinearDPOLoss(), arguments)
    full = run(LigerFusedLinearDPOLoss(), tensors())
    torch.testing.assert_close(gradients[1], full[2][1])
    assert gradients[0] is None and gradients[2] is None
    with torch.no_grad():
        again, _ = LigerFusedLinearDPOLoss()(*tensors())
    torch.testing.assert_close(again, value)


def test_options_and_shapes_are_checked():
    with pytest.raises(ValueError, match="loss_type: expected one of .* got 'ipo'"):
        LigerFusedLinearDPOLoss(loss_type="ipo")
    with pytest.raises(ValueError, match="label_smoothing"):
        LigerFusedLinearDPOLoss(label_smoothing=0.9)
    weight, hidden, target, bias, ref_input, ref_weight, ref_bias = tensors()
    loss = LigerFusedLinearDPOLoss()
    with pytest.raises(ValueError, match="chosen and rejected rows of equal number"):
        loss(weight, hidden[:3], target[:3])
    with pytest.raises(ValueError, match="ref_input .* expected both, or ref_chosen_logps"):
        loss(weight, hidden, target)
    cached = torch.zeros(PAIRS)
    with pytest.raises(ValueError, match="expected both of shape"):
        loss(weight, hidden, target, ref_chosen_logps=cached)
    with pytest.raises(ValueError, match="ref_input, ref_weight: expected none"):
        loss(weight, hidden, target, None, ref_input, ref_weight, ref_chosen_logps=cached, ref_rejected_logps=cached)
    alone = LigerFusedLinearDPOLoss(use_ref_model=False)
    with pytest.raises(ValueError, match="expected none with use_ref_model=False"):
        alone(weight, hidden, target, ref_chosen_logps=cached, ref_rejected_logps=cached)
