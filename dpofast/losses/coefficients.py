"""From token log-probs to pairs, and from the pairs' losses back to a coefficient for every token.

The coefficients d(sum of losses)/d(token log-prob) are all that the head needs to know of a loss. Autograd finds them
on N numbers, whatever the kind; only DPO's own loss on a GPU has them from its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpofast.common.autograd import recording
from dpofast.common.backend import uses_triton
from dpofast.losses.kinds import KINDS, Pairs
from dpofast.losses.sequences import Tokens, pair_logprobs, segment_sums, side_indices, spread

if TYPE_CHECKING:
    from dpofast.losses.config import PreferenceLoss


@dataclass(frozen=True)
class StepTotals:
    """What belongs to the whole optimizer step: see preference_loss for the three."""

    num_pairs: int
    num_chosen_tokens: int | Tensor | None = None
    earlier_rewards: Tensor | None = None

    def __post_init__(self) -> None:
        """Check what is divided by: 0 or a negative number would train in silence, and the wrong way."""
        for name in ("num_pairs", "num_chosen_tokens"):
            value = getattr(self, name)
            if isinstance(value, Tensor) or (name == "num_chosen_tokens" and value is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r}")

    def view(
        self,
        policy: Tensor,
        ref: Tensor,
        lengths: Tensor | None,
        chosen_sum: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Pairs:
        """Pairs out of (P, 2) log-probs and token counts, chosen and rejected."""
        # Without lengths a number on the CPU, which costs no launch.
        tokens = torch.full((2,), torch.nan) if lengths is None else lengths.to(policy.dtype).clamp(min=1).T
        step_tokens = tokens[0].sum() if self.num_chosen_tokens is None else self.num_chosen_tokens
        return Pairs(
            policy_chosen=policy[:, 0],
            policy_rejected=policy[:, 1],
            ref_chosen=ref[:, 0],
            ref_rejected=ref[:, 1],
            chosen_sum=policy[:, 0] if chosen_sum is None else chosen_sum,
            chosen_tokens=tokens[0],
            rejected_tokens=tokens[1],
            nll_scale=torch.as_tensor(self.num_pairs / step_tokens, dtype=policy.dtype),
            earlier_rewards=self.earlier_rewards,
            weights=weights,
        )


@dataclass(frozen=True)
class PairTerms:
    """losses (P,); logps and rewards as in PreferenceOutput; coefficients (N,) = d(sum of losses)/d(token log-prob)."""

    losses: Tensor
    logps: Tensor
    rewards: Tensor
    coefficients: Tensor


def pairs_of_tokens(
    tokens: Tokens, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss, totals: StepTotals
) -> tuple[Pairs, Tensor, Tensor]:
    """What the losses see, differentiable in tokens.logps; then logps and rewards as in PreferenceOutput."""
    sides = side_indices(pairs, tokens.logps.device)
    sums = segment_sums(tokens.logps, tokens.cu_targets)
    lengths = tokens.lengths() if loss.needs_lengths else None
    if loss.ld_alpha is None:
        logps, policy = sums, sums[sides]
    else:
        logps = policy = pair_logprobs(
            tokens.logps, tokens.cu_targets, pairs, ld_alpha=loss.ld_alpha, counted=tokens.counted
        )
    ref = torch.zeros_like(logps) if ref_logps is None else ref_logps.to(logps.dtype)
    weights = None
    if loss.use_weighting and lengths is not None and tokens.log_sum_sq is not None:
        aligned = torch.where(tokens.is_token(), (tokens.logps - tokens.log_sum_sq).detach(), 0.0)
        weights = (segment_sums(aligned, tokens.cu_targets) / lengths)[sides].sum(1).exp()
    view = totals.view(
        policy,
        ref[sides] if ref.dim() == 1 else ref,
        None if lengths is None else lengths[sides],
        sums[sides[:, 0]],
        weights,
    )
    return view, logps, loss.beta * (logps - ref)


def runs_fused(loss: PreferenceLoss, backend: str) -> bool:
    """Whether kernels/preference.py computes this loss: DPO, with label smoothing, per token, with ld_alpha."""
    plain = loss.f_divergence_type == "reverse_kl" and not loss.use_weighting and loss.rpo_alpha is None
    kinds = loss.kinds in (("sigmoid",), ("sigmoid_norm",)) and loss.kind_weights == (1.0,)
    return uses_triton(backend) and plain and kinds


def pair_terms(
    tokens: Tokens, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss, totals: StepTotals, backend: str
) -> PairTerms:
    """The loss of every pair and the coefficients of its tokens: no graph is recorded outside.

    Backend "triton" is one launch where the kernel has the loss; everything else is torch on tensors of N numbers.
    """
    if runs_fused(loss, backend):
        return _fused_terms(tokens, pairs, ref_logps, loss)
    with recording():
        leaf = tokens.logps.detach().clone().requires_grad_()  # a clone: not an inference tensor
        tokens = Tokens(leaf, tokens.cu_targets, tokens.counted, tokens.log_sum_sq)
        view, logps, rewards = pairs_of_tokens(tokens, pairs, ref_logps, loss, totals)
        losses = pair_losses(view, loss)
        (coefficients,) = torch.autograd.grad(losses.sum(), leaf)
    return PairTerms(losses.detach(), logps.detach(), rewards.detach(), coefficients)


def _fused_terms(tokens: Tokens, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss) -> PairTerms:
    from dpofast.kernels.preference import pair_adjacency, preference_sigmoid

    device = tokens.logps.device
    weighted = loss.ld_alpha is not None
    result = preference_sigmoid(
        tokens.logps,
        tokens.cu_targets.to(device, non_blocking=True),
        pair_adjacency(pairs, len(tokens.cu_targets) - 1).to(device, non_blocking=True),
        ref_logps,
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        lengths=tokens.lengths() if loss.needs_lengths else None,
        normalize=loss.kinds == ("sigmoid_norm",),
        positions=tokens.positions() if weighted else None,
        ld_alpha=loss.ld_alpha,
    )
    coefficients = result.coefficients
    if not weighted:
        coefficients = spread(coefficients, tokens.cu_targets, len(tokens.logps))
    return PairTerms(result.pair_losses, result.sequence_logps, result.rewards, coefficients)


def pair_losses(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """(P,): the weighted sum of the loss's kinds, rpo_alpha's NLL term added, times use_weighting's factor."""
    total = torch.zeros_like(x.policy_chosen)
    for kind, weight in zip(loss.kinds, loss.kind_weights, strict=True):
        total = total + weight * KINDS[kind].function(x, loss)
    if loss.rpo_alpha is not None:
        total = total + loss.rpo_alpha * x.chosen_nll()
    return total if x.weights is None else total * x.weights
