"""Assertions that name the value that differs, with the tolerance for two results of the same kernel."""

import torch


def named(name):
    """Return a `msg` for torch.testing.assert_close that puts `name` before the message."""
    return lambda text: f"{name}: {text}"


def assert_same(value, expected, what=""):
    """Assert that values are bit-identical in the interpreter, on a GPU within a few roundings of the largest value.

    On a GPU, other strides, dtypes and options compile to another program, whose threads may process other columns and
    so add the sums in another order.
    """
    if not value.is_cuda or not value.is_floating_point():
        assert torch.equal(value, expected), what
        return
    rounding = max(2.0**-20, torch.finfo(value.dtype).eps)
    finite = expected[expected.isfinite()].float().abs()
    size = float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(value, expected, rtol=rounding, atol=rounding * size, equal_nan=True, msg=named(what))
