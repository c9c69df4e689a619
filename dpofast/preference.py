"""Preference losses: per-token log-probs -> sequence log-probs -> loss. One small function a kind, found in a dict.

Symbols (nats): for a pair, w and l are policy minus reference sequence log-prob of the chosen and the rejected
response, summed over tokens; beta and label_smoothing as in PreferenceLoss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpofast.first_order import first_order_only
from dpofast.rows import choose_backend


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """Which loss, and its options; validated when built.

    Args:
        kind: "sigmoid" (DPO, arXiv 2305.18290 eq. 7; with label_smoothing > 0 its conservative form, cDPO).
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: the probability that a preference is flipped, in [0, 0.5].

    Raises:
        ValueError: an unknown kind or an option outside its range.
    """

    kind: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check every option."""
        if self.kind not in _LOSSES:
            raise ValueError(f"kind: expected one of {sorted(_LOSSES)}, got {self.kind!r}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta: expected a positive finite number, got {self.beta}")
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"label_smoothing: expected a number in [0, 0.5], got {self.label_smoothing}")


@dataclass(frozen=True)
class PreferenceOutput:
    """loss: scalar, a mean over pairs, or a sum over them divided by num_pairs; losses (P,); logps and rewards (S,).

    Only loss is differentiable. rewards = beta·(logp − ref_logp), in nats times beta.
    """

    loss: Tensor
    losses: Tensor
    logps: Tensor
    rewards: Tensor


def preference_loss(
    logps: Tensor,
    pairs: Tensor,
    ref_logps: Tensor,
    *,
    loss: PreferenceLoss | None = None,
    num_pairs: int | None = None,
) -> PreferenceOutput:
    """The preference loss of P pairs over S sequences.

    Args:
        logps: (S,) summed log-probs under the policy, nats, differentiable.
        pairs: (P, 2) integer, chosen and rejected sequence; a sequence may stand in several pairs.
        ref_logps: (S,) the same under the reference.
        loss: kind and options, default PreferenceLoss().
        num_pairs: what the sum over pairs is divided by, default P; the pairs of a whole optimizer step when these are
            one of its micro-batches.

    Raises:
        ValueError: shapes that do not fit, no pair, or (on the CPU) a pair that names a missing sequence.
    """
    loss = PreferenceLoss() if loss is None else loss
    check_pairs(logps, pairs, ref_logps)
    chosen, rejected = pairs.to(device=logps.device, dtype=torch.int64, non_blocking=True).unbind(1)
    logratios = logps - ref_logps.to(logps.dtype)
    losses = _LOSSES[loss.kind](logratios[chosen], logratios[rejected], loss)
    total = losses.sum() / (len(pairs) if num_pairs is None else num_pairs)
    return PreferenceOutput(total, losses.detach(), logps.detach(), loss.beta * logratios.detach())


def segment_sums(token_logps: Tensor, cu_targets: Tensor) -> Tensor:
    """Sums of token_logps (N,) over the sequences of cu_targets (S+1,) int32 on the CPU: (S,), differentiable.

    Added up in float64, so that the order in which a device adds does not show.
    """
    sums = token_logps.new_zeros(len(cu_targets) - 1, dtype=torch.float64)
    owner = spread(torch.arange(len(sums), device=token_logps.device), cu_targets, len(token_logps))
    return sums.index_add(0, owner, token_logps.double()).to(token_logps.dtype)


def token_preference_loss(
    token_logps: Tensor,
    cu_targets: Tensor,
    pairs: Tensor,
    ref_logps: Tensor,
    *,
    loss: PreferenceLoss | None = None,
    num_pairs: int | None = None,
    backend: str = "auto",
) -> PreferenceOutput:
    """preference_loss from per-token log-probs (N,): on a GPU, sums, losses and coefficients in one Triton launch.

    Args:
        token_logps: (N,) float32, nats, differentiable.
        cu_targets: (S+1,) int32 on the CPU: sequence s owns token_logps[cu_targets[s]:cu_targets[s+1]].
        pairs: (P, 2) int32 on the CPU.
        ref_logps: (S,) float32.
        loss: kind and options, default PreferenceLoss().
        num_pairs: what the sum over pairs is divided by, default P.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: as preference_loss, and a backend that cannot run here.
    """
    loss = PreferenceLoss() if loss is None else loss
    if choose_backend(backend, token_logps.device) != "triton":
        logps = segment_sums(token_logps, cu_targets)
        return preference_loss(logps, pairs, ref_logps, loss=loss, num_pairs=num_pairs)
    divisor = len(pairs) if num_pairs is None else num_pairs
    values = _FusedSigmoid.apply(token_logps, cu_targets, pairs, ref_logps, loss, divisor)
    return PreferenceOutput(*values)


class _FusedSigmoid(torch.autograd.Function):
    """kernels/preference.py; its coefficients d(sum of losses)/d(sequence log-prob) make backward a lookup."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        token_logps: Tensor,
        cu_targets: Tensor,
        pairs: Tensor,
        ref_logps: Tensor,
        loss: PreferenceLoss,
        divisor: int,
    ) -> tuple[Tensor, ...]:
        if len(pairs) == 0:
            raise ValueError("pairs: expected at least one pair, got none")
        terms = pair_terms(token_logps, cu_targets, pairs, ref_logps, loss, "triton")
        ctx.save_for_backward(token_logps, spread(terms.coefficients / divisor, cu_targets, len(token_logps)))
        outputs = (terms.losses, terms.logps, terms.rewards)
        ctx.mark_non_differentiable(*outputs)
        return (terms.losses.sum() / divisor, *outputs)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, token_coefficients = ctx.saved_tensors
        return (token_coefficients * grad_loss, *(None,) * 5)


@dataclass(frozen=True)
class PairTerms:
    """losses (P,), logps and rewards (S,), and coefficients (S,) = d(sum of losses)/d(sequence log-prob)."""

    losses: Tensor
    logps: Tensor
    rewards: Tensor
    coefficients: Tensor


def pair_terms(
    token_logps: Tensor, cu_targets: Tensor, pairs: Tensor, ref_logps: Tensor, loss: PreferenceLoss, backend: str
) -> PairTerms:
    """The loss of every pair and its derivative in closed form, from per-token log-probs (N,): no graph is recorded.

    cu_targets and pairs lie on the CPU; backend is "triton" (one launch) or "torch".
    """
    device = token_logps.device
    if backend == "triton":
        from dpofast.kernels.preference import pair_adjacency, preference_sigmoid

        result = preference_sigmoid(
            token_logps,
            cu_targets.to(device, non_blocking=True),
            pair_adjacency(pairs, len(cu_targets) - 1).to(device, non_blocking=True),
            ref_logps,
            beta=loss.beta,
            label_smoothing=loss.label_smoothing,
        )
        return PairTerms(result.pair_losses, result.sequence_logps, result.rewards, result.coefficients)
    logps = segment_sums(token_logps, cu_targets)
    logratios = logps - ref_logps.to(logps.dtype)
    chosen, rejected = pairs.to(device=device, dtype=torch.int64, non_blocking=True).unbind(1)
    w, l = logratios[chosen], logratios[rejected]  # noqa: E741
    by_chosen, by_rejected = _DERIVATIVES[loss.kind](w, l, loss)
    coefficients = torch.zeros_like(logps).index_add_(0, chosen, by_chosen).index_add_(0, rejected, by_rejected)
    return PairTerms(_LOSSES[loss.kind](w, l, loss), logps, loss.beta * logratios, coefficients)


def spread(values: Tensor, cu_targets: Tensor, num_targets: int) -> Tensor:
    """values (S,) repeated for every target of its sequence: (N,), without a sync."""
    lengths = cu_targets.diff().to(values.device, non_blocking=True)
    return values.repeat_interleave(lengths, output_size=num_targets)


def check_pairs(logps: Tensor, pairs: Tensor, ref_logps: Tensor) -> None:
    """ValueError unless logps and ref_logps are (S,), pairs (P, 2) with P > 0, and (on the CPU) name sequences < S."""
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(f"logps: expected a float tensor (S,), got {logps.dtype} {tuple(logps.shape)}")
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ValueError(f"pairs: expected an integer tensor (P, 2), got {pairs.dtype} {tuple(pairs.shape)}")
    if len(pairs) == 0:
        raise ValueError("pairs: expected at least one pair, got none")
    if ref_logps.shape != logps.shape:
        raise ValueError(f"ref_logps: expected shape {tuple(logps.shape)} like logps, got {tuple(ref_logps.shape)}")
    if (
        pairs.is_cpu
        and not torch.compiler.is_compiling()
        and not (0 <= int(pairs.min()) and int(pairs.max()) < len(logps))
    ):
        raise ValueError(f"pairs: expected sequence numbers in [0, {len(logps)}), got {pairs.tolist()}")


def _sigmoid(w: Tensor, l: Tensor, loss: PreferenceLoss) -> Tensor:  # noqa: E741  (the paper's letter)
    """DPO, arXiv 2305.18290 eq. 7: −(1−ε)·log σ(β(w − l)) − ε·log σ(−β(w − l))."""
    margin = loss.beta * (w - l)
    if loss.label_smoothing == 0:
        return -F.logsigmoid(margin)
    return -(1 - loss.label_smoothing) * F.logsigmoid(margin) - loss.label_smoothing * F.logsigmoid(-margin)


def _sigmoid_derivative(w: Tensor, l: Tensor, loss: PreferenceLoss) -> tuple[Tensor, Tensor]:  # noqa: E741
    """β·(ε·σ(β(w − l)) − (1−ε)·σ(−β(w − l))) for w, and its negative for l."""
    margin = loss.beta * (w - l)
    smoothed = loss.label_smoothing * margin.sigmoid() - (1 - loss.label_smoothing) * (-margin).sigmoid()
    return loss.beta * smoothed, -loss.beta * smoothed


_LOSSES: dict[str, Callable[[Tensor, Tensor, PreferenceLoss], Tensor]] = {"sigmoid": _sigmoid}
# d(loss of a pair)/dw and /dl
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, PreferenceLoss], tuple[Tensor, Tensor]]] = {
    "sigmoid": _sigmoid_derivative
}
KINDS = tuple(sorted(_LOSSES))
