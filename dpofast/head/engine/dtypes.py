"""Dtypes of the LM head: what log-probs and sums are accumulated in, and what rows of E are stored in."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and log-probs for inputs of `dtype`: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exp_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of E, the unnormalized softmax: the model's own, but float32 for float16.

    float16 would hold E, whose entries reach V − 1, behind a power of two that V alone fixes. It would not hold what
    dW needs beside it: c ⊙ h with |c| = |g|/S. On flat rows of V = 262,144 and g = 1e-3, a loss over 64 pairs, those
    products are of the size of float16's least number: dW is off by 57 %, at g = 1e-4 by 100 % (measured;
    tests/head/test_accuracy.py). A scale for them follows from g, which only the device knows, so it would cost a sync,
    or a pass over dW for every block of rows.
    """
    return torch.float32 if dtype == torch.float16 else dtype
