"""The public loss functions: preference_loss of sequence log-probs, token_preference_loss of token log-probs.

Both return a PreferenceOutput. The loss of each kind is in kinds.py, the sums over tokens in sequences.py, the way from
tokens to pairs and the coefficients back in coefficients.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpofast.common.autograd import ReverseModeFunction, check_derivatives, first_order_only
from dpofast.common.backend import choose_backend
from dpofast.losses.coefficients import inputs_of_tokens, pair_losses, pair_terms, rewards_of, runs_fused
from dpofast.losses.columns import NO_COLUMNS, PreferenceColumns
from dpofast.losses.config import PreferenceLoss, checked_loss
from dpofast.losses.pairs import Lists, Pairs, StepTotals, make_lists
from dpofast.losses.sequences import Tokens, chosen_and_rejected, of_lists, side_indices
from dpofast.losses.validate import check_pairs, check_tokens


@dataclass(frozen=True)
class PreferenceOutput:
    """The loss of P pairs over S sequences, and what is logged of them.

    loss: scalar, a mean over pairs, or a sum over them divided by num_pairs; losses (P,); logps and rewards (S,).
    Only loss is differentiable. rewards = beta·(logp − ref_logp), in nats times beta, without a reference beta·logp.
    With ld_alpha a response's log-prob depends on its partner: logps and rewards are then (P, 2), chosen and rejected.
    With a column beta, rewards are (P, 2) too, or of lists (P, K), 0 where a list has fewer responses.
    aux_loss is a model's own auxiliary loss (mixture-of-experts balancing), differentiable, not in loss, or None.
    """

    loss: Tensor
    losses: Tensor
    logps: Tensor
    rewards: Tensor
    aux_loss: Tensor | None = None

    def of_pairs(self, name: str, pairs: Tensor, lists: Tensor | None = None) -> Tensor:
        """logps or rewards (`name`) of every pair's chosen and rejected response, of a list its best and worst: (P, 2).

        pairs and lists are those of the batch: PackedBatch.pairs and PackedBatch.columns.lists.
        """
        values = getattr(self, name)
        if lists is None or values.dim() == 1:
            return chosen_and_rejected(values, pairs)
        last = (lists >= 0).sum(1, keepdim=True) - 1
        return torch.cat([values[:, :1], values.gather(1, last.to(values.device, non_blocking=True))], dim=1)

    def of_lists(self, name: str, lists: Tensor) -> Tensor:
        """logps or rewards (`name`) of every list's responses: (P, K), 0 where a list has fewer."""
        values = getattr(self, name)
        if values.dim() == 2:
            return values[:, : lists.shape[1]]
        return of_lists(values, lists)


def preference_loss(
    logps: Tensor,
    pairs: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: PreferenceLoss | None = None,
    lengths: Tensor | None = None,
    num_pairs: int | None = None,
    num_chosen_tokens: float | None = None,
    earlier_rewards: Tensor | None = None,
    columns: PreferenceColumns = NO_COLUMNS,
) -> PreferenceOutput:
    """The preference loss of P pairs, or lists, over S sequences.

    Args:
        logps: (S,) summed log-probs under the policy, nats, differentiable.
        pairs: (P, 2) integer, chosen and rejected sequence; a sequence may stand in several pairs.
        ref_logps: (S,) the same under the reference; kinds without one only report rewards against it.
        loss: kind and options, default PreferenceLoss().
        lengths: (S,) tokens of each sequence, for the kinds that divide by them; 0 counts as 1.
        num_pairs: what the sum over pairs is divided by, default P; the pairs of a whole optimizer step when these are
            one of its micro-batches.
        num_chosen_tokens: what "sft" divides by, default these pairs' chosen tokens; those of the whole step likewise.
            With token weights, the sum of those of the chosen responses.
        earlier_rewards: (2,) float64, sum and number of the rewards of earlier steps, for bco_delta="running_mean".
        columns: weights, margins, lists and more of the rows (PackedBatch.columns). Of lists, pairs names the best and
            the worst response. token_weights are not applied here: logps and ref_logps are sums weighted by them, as
            sequence_logprobs returns them.

    Raises:
        ValueError: shapes that do not fit, no pair, something the kind needs that is missing, a loss that needs token
            log-probs (ld_alpha, use_weighting, with token_weights every kind that divides by lengths), or (on the CPU)
            a pair that names a missing sequence.
    """
    loss = checked_loss(loss)
    check_pairs(logps, pairs, ref_logps, loss, columns)
    for name in ("ld_alpha", "use_weighting"):
        if getattr(loss, name) not in (None, False):
            raise ValueError(
                f"{name}: sums over sequences do not hold what it needs, for kind {loss.kind!r} or any other: use "
                "token_preference_loss or linear_preference_loss"
            )
    if loss.needs_lengths and (lengths is None or lengths.shape != logps.shape):
        got = None if lengths is None else tuple(lengths.shape)
        raise ValueError(f"lengths: kind {loss.kind!r} divides by them: expected shape {tuple(logps.shape)}, got {got}")
    sides = side_indices(pairs, logps.device)
    ref = torch.zeros_like(logps) if ref_logps is None else ref_logps.to(logps.dtype)
    totals = StepTotals(len(pairs) if num_pairs is None else num_pairs, num_chosen_tokens, earlier_rewards)
    counts = lengths[sides] if loss.needs_lengths and lengths is not None else None
    values = totals.make_pairs(logps[sides], ref[sides], counts, loss, columns)
    lists = None
    if loss.of_lists:
        lists = make_lists(logps, ref, lengths if loss.needs_lengths else None, pairs, loss, columns)
    return _output(values, lists, loss, totals, logps, rewards_of(logps - ref, pairs, loss, columns))


def _output(
    values: Pairs, lists: Lists | None, loss: PreferenceLoss, totals: StepTotals, logps: Tensor, rewards: Tensor
) -> PreferenceOutput:
    losses = pair_losses(values, lists, loss)
    return PreferenceOutput(losses.sum() / totals.num_pairs, losses.detach(), logps.detach(), rewards.detach())


def token_preference_loss(
    token_logps: Tensor,
    cu_targets: Tensor,
    pairs: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: PreferenceLoss | None = None,
    log_sum_sq_probs: Tensor | None = None,
    counted: Tensor | None = None,
    num_pairs: int | None = None,
    num_chosen_tokens: float | None = None,
    earlier_rewards: Tensor | None = None,
    columns: PreferenceColumns = NO_COLUMNS,
    backend: str = "auto",
) -> PreferenceOutput:
    """preference_loss from per-token log-probs (N,): on a GPU, DPO's is one Triton launch for values and coefficients.

    Args:
        token_logps: (N,) float32, nats, differentiable.
        cu_targets: (S+1,) int32 on the CPU: sequence s owns token_logps[cu_targets[s]:cu_targets[s+1]].
        pairs: (P, 2) int32 on the CPU.
        ref_logps: (S,) float32. With ld_alpha (P, 2): what pair_logprobs makes of the reference's token log-probs.
        loss: kind and options, default PreferenceLoss().
        log_sum_sq_probs: (N,) log Σp² in nats, for use_weighting.
        counted: (N,) bool, False where a target was ignored and is no token; default, all are.
        num_pairs, num_chosen_tokens, earlier_rewards: as in preference_loss.
        columns: as in preference_loss, and token_weights, by which log-probs are multiplied in sums, means and lengths;
            a target of weight 0 counts for nothing and has a gradient of exactly 0. ref_logps are sums weighted alike.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: as preference_loss, and a backend that cannot run here.
    """
    loss = checked_loss(loss)
    tokens = Tokens(token_logps, cu_targets, counted, log_sum_sq_probs, columns.token_weights)
    check_tokens(tokens, pairs, ref_logps, loss, columns)
    totals = StepTotals(len(pairs) if num_pairs is None else num_pairs, num_chosen_tokens, earlier_rewards)
    if runs_fused(loss, choose_backend(backend, token_logps.device), columns):
        check_derivatives(token_logps, ref_logps)
        return PreferenceOutput(*_Fused.apply(token_logps, tokens, pairs, ref_logps, loss, totals, columns))
    values, lists, logps, rewards = inputs_of_tokens(tokens, pairs, ref_logps, loss, totals, columns)
    return _output(values, lists, loss, totals, logps, rewards)


class _Fused(ReverseModeFunction):
    """token_preference_loss by kernels/preference.py: backward multiplies the coefficients that forward saved."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        token_logps: Tensor,
        tokens: Tokens,
        pairs: Tensor,
        ref_logps: Tensor | None,
        loss: PreferenceLoss,
        totals: StepTotals,
        columns: PreferenceColumns,
    ) -> tuple[Tensor, ...]:
        terms = pair_terms(tokens, pairs, ref_logps, loss, totals, "triton", columns)
        ctx.save_for_backward(token_logps, terms.coefficients / totals.num_pairs)
        outputs = (terms.losses, terms.logps, terms.rewards)
        ctx.mark_non_differentiable(*outputs)
        return (terms.losses.sum() / totals.num_pairs, *outputs)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, coefficients = ctx.saved_tensors
        return (coefficients * grad_loss, *(None,) * 6)
