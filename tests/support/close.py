"""Assertions that say which value differs, and how equal two results of the same kernel must be."""

import torch


def named(name):
    """The `msg` of torch.testing.assert_close that puts a name before what differs."""
    return lambda text: f"{name}: {text}"


def assert_same(value, expected, what=""):
    """Equal to the bit in the interpreter; on a GPU within a few roundings of the largest.

    Other strides, dtypes and options make another program, and there its threads may own other columns, whose sums are
    then added up in another order.
    """
    if not value.is_cuda or not value.is_floating_point():
        assert torch.equal(value, expected), what
        return
    rounding = max(2.0**-20, torch.finfo(value.dtype).eps)
    finite = expected[expected.isfinite()].float().abs()
    size = float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(value, expected, rtol=rounding, atol=rounding * size, equal_nan=True, msg=named(what))
