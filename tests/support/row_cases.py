"""Inputs, options, float64 truth and tolerances shared by the tests of the LM head and of the row kernels."""

import torch

from dpofast import reference

IGNORED = -100
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "softcap": 30.0, "logit_scale": 1.7, "temperature": 0.6},
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def head_inputs(n=37, d=24, vocab=301, dtype=torch.float32, seed=0, device="cpu"):
    """Hidden states, weight, bias, targets with ignored ones, and an upstream gradient that is not 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (torch.randn(vocab, d, generator=generator) / d**0.5 * 3).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    targets = torch.randint(0, vocab, (n,), generator=generator)
    targets[::5] = IGNORED
    upstream = torch.randn(n, generator=generator)
    return tuple(tensor.to(device) for tensor in (hidden, weight, bias, targets, upstream))


def rows(n, v, device, dtype=torch.float32, scale=3.0):
    """Logits, targets (the second row ignored) and an upstream gradient that is not 1."""
    logits = (torch.randn(n, v) * scale).to(device, dtype)
    targets = torch.randint(0, v, (n,))
    targets[1:2] = IGNORED
    return logits, targets.to(device), torch.randn(n).to(device)


def extreme_rows(device):
    """Rows of logits near ±1e4, and a target 1e4 below the others."""
    logits, targets, upstream = rows(4, 3000, device)
    logits[0] = torch.where(torch.rand(3000) < 0.5, 1e4, -1e4).to(device)
    logits[2] *= 3e3
    logits[3, 7] = -1e4
    targets[3] = 7
    return logits, targets, upstream


def make_bias(options, v, device):
    return {**options, "bias": torch.randn(v).to(device)} if options.get("bias") else options


def truth(logits, targets, upstream, dtype, *, bias=None, **scales):
    """Compute the same by autograd through the reference in `dtype`; E is logp's gradient without its row factor."""
    x = logits.to(dtype).requires_grad_()
    z = reference.scaled_logits(x if bias is None else x + bias.to(dtype), **scales)
    logps = reference.logprobs(z, targets)
    (unit,) = torch.autograd.grad(logps.sum(), x, retain_graph=True)
    (grad,) = torch.autograd.grad(logps, x, upstream.to(dtype))
    z, keep = z.detach(), targets != IGNORED
    sum_exp = torch.where(keep, (z - z.amax(1, keepdim=True)).exp().sum(1), 1.0)
    factor = scales.get("logit_scale", 1.0) / scales.get("temperature", 1.0)
    return {
        "logps": logps.detach(),
        "row_max": torch.where(keep, z.amax(1), 0.0),
        "sum_exp": sum_exp,
        "exp": unit * -(sum_exp / factor)[:, None],
        "grad": grad,
        **reference.token_statistics(z, targets),
    }


def assert_as_good_as_torch(got, exact, framework):
    """Assert an error against float64 of at most twice float32 torch's own, plus two roundings of max z and the value.

    z is float32 in every implementation, so its rounding is an absolute error in nats, and a relative error of exp(z).
    """
    assert got.keys() == exact.keys()
    rounding = 2.0**-22
    z_max = exact["row_max"].abs().max()
    for name, value in got.items():
        if name == "is_top1":
            assert torch.equal(value, exact[name]), name
            continue
        assert value.dtype == torch.float32, name
        error = (value.double() - exact[name]).abs().max()
        own = (framework[name].double() - exact[name]).abs().max()
        size = exact[name].abs().max()
        floor = rounding * ((z_max + 1) * size if name in ("sum_exp", "exp", "grad") else z_max + size)
        assert error <= 2 * own + floor, f"{name}: error {error:.3g}, torch's {own:.3g}, floor {floor:.3g}"


def store_error(dtype, device):
    """Return the relative error of one store: half an ulp, or one ulp where the interpreter truncates to bfloat16.

    On a GPU the stored value itself may differ as well (close.assert_same).
    """
    epsilon = torch.finfo(dtype).eps
    if device.type != "cpu":
        return epsilon / 2 + 2.0**-20
    return epsilon if dtype == torch.bfloat16 else epsilon / 2
