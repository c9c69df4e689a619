"""Losses of P pairs from N token log-probs, and the coefficients d(sum of losses)/d(token log-prob), (N,).

The coefficients are all that the LM head needs of a loss for its backward pass. Autograd computes them on tensors of N
numbers for every kind; DPO's own loss has a Triton kernel (kernels/preference.py) that returns both in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpofast.common.autograd import recording
from dpofast.common.backend import uses_triton
from dpofast.losses.columns import NO_COLUMNS, PreferenceColumns
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.own_kinds import kind_of
from dpofast.losses.pairs import Lists, Pairs, StepTotals, make_lists
from dpofast.losses.sequences import Tokens, of_lists, pair_logprobs, segment_sums, side_indices, spread


@dataclass(frozen=True)
class PairTerms:
    """Losses of P pairs and what belongs to them, without an autograd graph.

    losses (P,); logps and rewards as in PreferenceOutput; coefficients (N,) = d(sum of losses)/d(token log-prob).
    """

    losses: Tensor
    logps: Tensor
    rewards: Tensor
    coefficients: Tensor


def inputs_of_tokens(
    tokens: Tokens,
    pairs: Tensor,
    ref_logps: Tensor | None,
    loss: PreferenceLoss,
    totals: StepTotals,
    columns: PreferenceColumns,
) -> tuple[Pairs, Lists | None, Tensor, Tensor]:
    """Pairs, and Lists for a loss of lists, differentiable in tokens.logps; then logps and rewards."""
    sides = side_indices(pairs, tokens.logps.device)
    sums = tokens.sums()
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
        weights = (segment_sums(aligned, tokens.cu_targets, tokens.weights) / lengths)[sides].sum(1).exp()
    values = totals.make_pairs(
        policy,
        ref[sides] if ref.dim() == 1 else ref,
        None if lengths is None else lengths[sides],
        loss,
        columns,
        sums[sides[:, 0]],
        weights,
    )
    lists = make_lists(logps, ref, lengths, pairs, loss, columns) if loss.of_lists else None
    return values, lists, logps, rewards_of(logps - ref, pairs, loss, columns)


def rewards_of(ratios: Tensor, pairs: Tensor, loss: PreferenceLoss, columns: PreferenceColumns) -> Tensor:
    """β times the log-ratios (S,) or, with ld_alpha, (P, 2): as PreferenceOutput.rewards documents them."""
    if columns.beta is None:
        return loss.beta * ratios
    rows = pairs if columns.lists is None else columns.lists
    if ratios.dim() == 1:
        ratios = of_lists(ratios, rows)
    return columns.beta.to(ratios.device, ratios.dtype)[:, None] * ratios


def runs_fused(loss: PreferenceLoss, backend: str, columns: PreferenceColumns = NO_COLUMNS) -> bool:
    """Whether kernels/preference.py computes this loss: DPO, also with label smoothing, per token, or with ld_alpha.

    Of pairs with any columns; of lists of responses it has no loss.
    """
    plain = loss.f_divergence_type == "reverse_kl" and not loss.use_weighting and loss.rpo_alpha is None
    kinds = loss.kinds in (("sigmoid",), ("sigmoid_norm",)) and loss.kind_weights == (1.0,)
    return uses_triton(backend) and plain and kinds and columns.lists is None


def pair_terms(
    tokens: Tokens,
    pairs: Tensor,
    ref_logps: Tensor | None,
    loss: PreferenceLoss,
    totals: StepTotals,
    backend: str,
    columns: PreferenceColumns = NO_COLUMNS,
) -> PairTerms:
    """The loss of every pair and the coefficients of its tokens; records no autograd graph.

    With a Triton backend one kernel launch where runs_fused, else torch on tensors of N numbers.
    """
    if runs_fused(loss, backend, columns):
        return _fused_terms(tokens, pairs, ref_logps, loss, columns)
    with recording():
        leaf = tokens.logps.detach().clone().requires_grad_()  # a clone: not an inference tensor
        tokens = replace(tokens, logps=leaf)
        values, lists, logps, rewards = inputs_of_tokens(tokens, pairs, ref_logps, loss, totals, columns)
        losses = pair_losses(values, lists, loss)
        (coefficients,) = torch.autograd.grad(losses.sum(), leaf)
    return PairTerms(losses.detach(), logps.detach(), rewards.detach(), coefficients)


def _fused_terms(
    tokens: Tokens, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss, columns: PreferenceColumns
) -> PairTerms:
    from dpofast.kernels.preference import PairOptions, pair_adjacency, preference_sigmoid

    device = tokens.logps.device

    def column(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(device, torch.float32)

    result = preference_sigmoid(
        tokens.logps,
        tokens.cu_targets.to(device, non_blocking=True),
        pair_adjacency(pairs, len(tokens.cu_targets) - 1).to(device, non_blocking=True),
        ref_logps,
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        lengths=tokens.lengths() if loss.needs_lengths else None,
        normalize=loss.kinds == ("sigmoid_norm",),
        positions=None if loss.ld_alpha is None else tokens.positions(),
        ld_alpha=loss.ld_alpha,
        token_weights=column(tokens.weights),
        of_pairs=PairOptions(*map(column, (columns.weight, columns.margin, columns.beta, columns.label_smoothing))),
    )
    coefficients = result.coefficients
    if loss.ld_alpha is None and tokens.weights is None:
        coefficients = spread(coefficients, tokens.cu_targets, len(tokens.logps))
    return PairTerms(result.pair_losses, result.sequence_logps, result.rewards, coefficients)


def pair_losses(x: Pairs, lists: Lists | None, loss: PreferenceLoss) -> Tensor:
    """(P,) losses: the weighted sum over the kinds, plus rpo_alpha's NLL term, times the pairs' weights.

    Of a mix, only the kinds that take margins see the column.
    """
    if len(x.policy_chosen) == 0:  # sequences that no row names; a kind is never asked for the losses of no rows
        return x.policy_chosen
    total = torch.zeros_like(x.policy_chosen)
    for name, weight in zip(loss.kinds, loss.kind_weights, strict=True):
        kind = kind_of(name)
        pairs = x if kind.margin or x.offset is None else replace(x, offset=None)
        total = total + weight * kind.function(lists if kind.lists else pairs, loss)
    if loss.rpo_alpha is not None:
        total = total + loss.rpo_alpha * x.chosen_nll()
    return total if x.weights is None else total * x.weights
