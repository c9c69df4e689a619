"""Argument checks of the preference losses: pairs, reference log-probs and token log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast.losses.config import PreferenceLoss
from dpofast.losses.sequences import Tokens


def check_pairs(logps: Tensor, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss) -> None:
    """ValueError unless logps and ref_logps are (S,), pairs (P, 2) with P > 0, and (on the CPU) name sequences < S."""
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(f"logps: expected a float tensor (S,), got {logps.dtype} {tuple(logps.shape)}")
    check_pair_names(pairs, len(logps))
    check_reference(ref_logps, len(logps), len(pairs), loss)


def check_pair_names(pairs: Tensor, sequences: int) -> None:
    """ValueError unless pairs are (P, 2) integers with P > 0 that (looked at on the CPU only) name sequences."""
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ValueError(f"pairs: expected an integer tensor (P, 2), got {pairs.dtype} {tuple(pairs.shape)}")
    if len(pairs) == 0:
        raise ValueError("pairs: expected at least one pair, got none")
    if pairs.is_cpu and not torch.compiler.is_compiling():
        if not (0 <= int(pairs.min()) and int(pairs.max()) < sequences):
            raise ValueError(f"pairs: expected sequence numbers in [0, {sequences}), got {pairs.tolist()}")


def check_reference(ref_logps: Tensor | None, sequences: int, pairs: int, loss: PreferenceLoss) -> None:
    """ValueError if a kind's reference is missing, or has another shape than (S,), with ld_alpha (P, 2)."""
    if ref_logps is None:
        if loss.needs_reference:
            raise ValueError(
                f"ref_logps: kind {loss.kind!r} needs the reference's log-probs, got None: "
                "compute them with the reference model, give rows ref_chosen_logps and ref_rejected_logps, or name a "
                "kind without a reference (simpo, orpo, cpo, sft)"
            )
        return
    shape, reason = ((sequences,), "one a sequence") if loss.ld_alpha is None else ((pairs, 2), "with ld_alpha")
    if ref_logps.shape != shape:
        raise ValueError(f"ref_logps: expected shape {shape}, {reason}, got {tuple(ref_logps.shape)}")


def check_tokens(tokens: Tokens, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss) -> None:
    """ValueError unless the loss has what it needs of the tokens, and the pairs fit them."""
    sequences = len(tokens.cu_targets) - 1
    check_pair_names(pairs, sequences)
    check_reference(ref_logps, sequences, len(pairs), loss)
    shapes = {"log_sum_sq_probs": tokens.log_sum_sq, "counted": tokens.counted}
    for name, tensor in shapes.items():
        if tensor is not None and tensor.shape != tokens.logps.shape:
            raise ValueError(f"{name}: expected shape {tuple(tokens.logps.shape)}, got {tuple(tensor.shape)}")
    if loss.use_weighting and tokens.log_sum_sq is None:
        raise ValueError(f"log_sum_sq_probs: use_weighting of kind {loss.kind!r} needs them, got None")
