"""From token log-probs to pairs, and from the pairs' losses back to a coefficient for every token.

The coefficients d(sum of losses)/d(token log-prob) are all that the head needs to know of a loss. Autograd finds them
on N numbers, whatever the kind; only DPO's own loss on a GPU has them from its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpofast.first_order import recording
from dpofast.losses import Pairs, pair_losses
from dpofast.rows import uses_triton

if TYPE_CHECKING:
    from dpofast.preference import PreferenceLoss


@dataclass(frozen=True)
class Tokens:
    """The targets of S sequences.

    logps (N,) float, nats; cu_targets (S+1,) int32 on the CPU; counted (N,) bool, False where a target was ignored, or
    None if none was; log_sum_sq (N,), log Σp², or None.
    """

    logps: Tensor
    cu_targets: Tensor
    counted: Tensor | None = None
    log_sum_sq: Tensor | None = None

    def is_token(self) -> Tensor:
        """counted, all of them if it is None."""
        return torch.ones_like(self.logps, dtype=torch.bool) if self.counted is None else self.counted

    def lengths(self) -> Tensor:
        """(S,) in the dtype of logps: the counted targets of each sequence, at least 1."""
        if self.counted is None:
            counts = self.cu_targets.diff().to(self.logps.device, self.logps.dtype, non_blocking=True)
        else:
            counts = segment_sums(self.counted.to(self.logps.dtype), self.cu_targets)
        return counts.clamp(min=1)

    def positions(self) -> Tensor:
        """(N,) int32: how many counted targets of its sequence stand before each target."""
        counted = self.is_token().int()
        before = counted.cumsum(0, dtype=torch.int32) - counted
        # an empty sequence at the end starts where nothing is, and has no target to ask
        starts = self.cu_targets[:-1].long().to(before.device, non_blocking=True)
        padded = torch.nn.functional.pad(before, (0, 1))
        return before - spread(padded[starts], self.cu_targets, len(before))


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


def segment_sums(token_logps: Tensor, cu_targets: Tensor) -> Tensor:
    """Sums of token_logps (N,) over the sequences of cu_targets (S+1,) int32 on the CPU: (S,), differentiable.

    Added up in float64, so that the order in which a device adds does not show.
    """
    sums = token_logps.new_zeros(len(cu_targets) - 1, dtype=torch.float64)
    owner = spread(torch.arange(len(sums), device=token_logps.device), cu_targets, len(token_logps))
    return sums.index_add(0, owner, token_logps.double()).to(token_logps.dtype)


def spread(values: Tensor, cu_targets: Tensor, num_targets: int) -> Tensor:
    """values (S,) repeated for every target of its sequence: (N,), without a sync."""
    lengths = cu_targets.diff().to(values.device, non_blocking=True)
    return values.repeat_interleave(lengths, output_size=num_targets)


def side_indices(pairs: Tensor, device: torch.device) -> Tensor:
    """pairs as an index: int64 on the device."""
    return pairs.to(device=device, dtype=torch.int64, non_blocking=True)


def pair_logprobs(
    token_logps: Tensor, cu_targets: Tensor, pairs: Tensor, *, ld_alpha: float, counted: Tensor | None = None
) -> Tensor:
    """Sequence log-probs (P, 2) of chosen and rejected response as LD-DPO weights them (arXiv 2409.06411).

    Tokens up to the length of the pair's shorter response count once, further ones ld_alpha times. token_logps (N,),
    nats, differentiable; cu_targets (S+1,) and pairs (P, 2) int32 on the CPU; counted (N,) as in token_preference_loss.
    """
    tokens = Tokens(token_logps, cu_targets, counted)
    # A response shared by several pairs has another weight in each: every pair gets a copy of its tokens' numbers.
    sequence = pairs.reshape(-1).long()
    sizes = cu_targets.diff().long()[sequence]
    side = torch.arange(len(sequence)).repeat_interleave(sizes)
    token = torch.arange(len(side)) + (cu_targets[:-1].long()[sequence] - (sizes.cumsum(0) - sizes))[side]
    side, token = (index.to(token_logps.device, non_blocking=True) for index in (side, token))
    shared = tokens.lengths()[side_indices(pairs, token_logps.device)].amin(1).repeat_interleave(2)
    weight = torch.where(tokens.positions()[token] < shared[side], 1.0, ld_alpha).double()
    sums = token_logps.new_zeros(len(sequence), dtype=torch.float64)
    return sums.index_add(0, side, weight * token_logps[token].double()).to(token_logps.dtype).view(-1, 2)


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
