"""Hidden states and heads, their float64 truth and tolerances, shared by the tests of kernels/exp_gemm.py."""

import math

import torch

from dpofast import reference
from tests.support.row_cases import IGNORED


def problem(n, d, v, device, dtype=torch.float32, scale=3.0):
    """Hidden states and a head whose logits are about ``scale`` in size, and targets, the second of them ignored."""
    hidden = (torch.randn(n, d) * scale / math.sqrt(d)).to(device, dtype)
    targets = torch.randint(0, v, (n,))
    targets[1:2] = IGNORED
    return hidden, torch.randn(v, d).to(device, dtype), targets.to(device)


def truth(hidden, weight, targets, dtype, *, bias=None, **scales):
    """(logps, lse, largest |z|) by the reference in ``dtype``."""
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    z = reference.scaled_logits(logits, **scales)
    lse = torch.where(targets == IGNORED, 0.0, z.logsumexp(-1))
    return reference.logprobs(z, targets), lse, z[z.isfinite()].abs().max()


def tensor_core_error(hidden):
    """Relative error of a 16-bit product on a GPU: a tensor core may cut its sum to float32 at every 16 terms."""
    return 2.0**-22 * hidden.shape[1] / 16 if hidden.is_cuda and hidden.dtype != torch.float32 else 0.0


def assert_logps_as_good_as_torch(result, hidden, weight, targets, **options):
    """Error against float64 within twice float32 torch's own, plus two roundings of the largest z and of the value.

    z is a float32 wherever it is computed, so its last bits are an error in nats.
    """
    exact_logps, exact_lse, z_max = truth(hidden, weight, targets, torch.float64, **options)
    torch_logps, torch_lse, _ = truth(hidden, weight, targets, torch.float32, **options)
    for name, exact, framework in (("logps", exact_logps, torch_logps), ("lse", exact_lse, torch_lse)):
        value = getattr(result, name)
        assert value.dtype == torch.float32
        error, own = (value.double() - exact).abs().max(), (framework.double() - exact).abs().max()
        floor = 2.0**-22 * (z_max + exact.abs().max()) + tensor_core_error(hidden) * z_max
        assert error <= 2 * own + floor, f"{name}: error {error:.3g}, torch's {own:.3g}, floor {floor:.3g}"
