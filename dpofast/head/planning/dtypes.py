"""Dtypes of the LM head: what log-probs and sums are accumulated in, and what rows of E are stored in."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and log-probs for inputs of `dtype`: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaleless_exp_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of E whose rows are not scaled: the model's own, but float32 for float16.

    float16 holds neither E, whose entries reach V − 1, nor c ⊙ h with |c| = |g|/S beside it. RowEngine scales
    both by powers of two (float16_scale.py), and its E has the model's dtype. Tiles on a CPU, which has no product that
    float16 would make faster, and heads that are sharded over ranks do not.
    """
    return torch.float32 if dtype == torch.float16 else dtype
