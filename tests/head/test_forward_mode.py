"""Forward mode and torch.func: an error, where derivatives would be zero or absent, and right on 'reference'."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from dpofast import PreferenceLoss, linear_logprobs, linear_preference_loss, logprobs
from dpofast.common.autograd import ReverseModeFunction
from dpofast.head.vocab_parallel import _VocabParallelLogprobs
from dpofast.losses.functional import _Fused
from dpofast.model.lora import _LoraLinear

REFUSED = "no forward-mode derivatives .* use reverse mode"
TARGETS = torch.tensor([1, 4, 0, 7, 2])
CU, PAIRS = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 6, generator=generator), torch.randn(11, 6, generator=generator)


def token_logps(hidden, weight, **options):
    return linear_logprobs(hidden, weight, TARGETS, **options).logps


def loss(hidden, weight, ref_logps=None):
    ref_logps = torch.zeros(2) if ref_logps is None else ref_logps
    return linear_preference_loss(hidden, weight, TARGETS, CU, PAIRS, ref_logps, loss=PreferenceLoss()).loss


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda hidden, weight, dual: token_logps(dual(hidden), weight),
        lambda hidden, weight, dual: token_logps(hidden, dual(weight)),
        lambda hidden, weight, dual: token_logps(hidden, weight, bias=dual(weight[:, 0])),
        lambda hidden, weight, dual: loss(dual(hidden), weight),
        lambda hidden, weight, dual: loss(hidden, dual(weight)),
        lambda hidden, weight, dual: loss(hidden, weight, dual(torch.zeros(2))),
        lambda hidden, weight, dual: logprobs(dual(hidden @ weight.T), TARGETS),
    ],
    ids=["hidden", "weight", "bias", "loss-hidden", "loss-weight", "loss-reference", "logprobs"],
)
def test_a_tangent_is_refused(function, trains):
    hidden, weight = (tensor.requires_grad_(trains) for tensor in tensors())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
        function(hidden, weight, lambda tensor: forward_ad.make_dual(tensor, torch.ones_like(tensor)))


def test_torch_func_is_refused_and_the_reference_backend_has_both_modes():
    hidden, weight = tensors()
    for transform in (jacfwd(token_logps), lambda *x: jvp(token_logps, x, tuple(map(torch.ones_like, x)))):
        with pytest.raises(RuntimeError, match=REFUSED):
            transform(hidden, weight)

    def plain(hidden):
        return token_logps(hidden, weight, backend="reference")

    torch.testing.assert_close(jacfwd(plain)(hidden), jacrev(plain)(hidden))


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: vjp(f, x), jacrev], ids=["grad", "vjp", "jacrev"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda hidden, weight: token_logps(hidden, weight).sum(),
        loss,
        lambda hidden, weight: logprobs(hidden @ weight.T, TARGETS).sum(),
    ],
    ids=["token", "loss", "logprobs"],
)
def test_reverse_transforms_of_torch_func_are_refused(function, transform, mapped):
    hidden, weight = tensors()

    def value(hidden):
        if mapped:
            return vmap(lambda one: function(one, weight))(torch.stack([hidden, hidden])).sum()
        return function(hidden, weight)

    with pytest.raises(RuntimeError, match="no torch.func transforms .* use torch.autograd"):
        transform(value)(hidden)
    # of a constant inside a transform of something else, and under torch.autograd's own functional, all is well
    expected = torch.autograd.functional.jacobian(lambda h: token_logps(h, weight, backend="reference").sum(), hidden)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(lambda h: token_logps(h, weight).sum(), hidden), expected
    )
    assert (
        grad(lambda scale: scale * token_logps(hidden, weight).sum())(torch.ones(()))
        == token_logps(hidden, weight).sum()
    )


@pytest.mark.parametrize("function", [_VocabParallelLogprobs, _Fused, _LoraLinear])
def test_every_autograd_function_refuses(function):
    assert issubclass(function, ReverseModeFunction)
    with pytest.raises(RuntimeError, match=REFUSED):
        function.jvp(None)


def test_the_check_leaves_no_break_in_a_compiled_graph():
    torch.compiler.reset()
    compiled = torch.compile(token_logps, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors()), token_logps(*tensors()))
    torch.compiler.reset()
