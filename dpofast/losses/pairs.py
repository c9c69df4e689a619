"""Pairs and Lists: the tensors that every loss reads; StepTotals: the sums over a whole optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast.losses.columns import PreferenceColumns
from dpofast.losses.divergences import DIVERGENCES
from dpofast.losses.options import LossOptions
from dpofast.losses.sequences import at_least_one_token, of_lists, side_indices


@dataclass(frozen=True)
class Pairs:
    """What a loss kind reads of P pairs: log-probs and token counts, tensors (P,) in float32 or float64.

    Attributes:
        policy_chosen, policy_rejected: log-probs p_w and p_l under the policy, nats, summed over tokens; with ld_alpha
            weighted by it.
        ref_chosen, ref_rejected: the same under the reference, or 0 without one.
        chosen_sum: the chosen response's log-prob without ld_alpha's weights, which NLL terms take.
        chosen_tokens, rejected_tokens: n_w and n_l, 1 in place of 0; NaN where the loss does not need them. With token
            weights their sums, as all log-probs here are weighted.
        nll_scale: scalar, pairs over chosen tokens of the whole step: turns a mean over pairs into one over tokens.
        earlier_rewards: (2,) float64, sum and number of the rewards before this call (bco_pair's running mean).
        weights: factor of each pair, without gradient, or None: use_weighting's, times the column `weight`.
        beta: β, the option, or the column (P,).
        label_smoothing: ε, the option, or the column (P,).
        offset: the column `margin` (P,), nats, or None.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_sum: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    nll_scale: Tensor
    earlier_rewards: Tensor | None
    weights: Tensor | None
    beta: Tensor | float
    label_smoothing: Tensor | float
    offset: Tensor | None

    @property
    def chosen(self) -> Tensor:
        """w, the log-ratio of the chosen response: (P,), nats."""
        return self.policy_chosen - self.ref_chosen

    @property
    def rejected(self) -> Tensor:
        """l, the log-ratio of the rejected response: (P,), nats."""
        return self.policy_rejected - self.ref_rejected

    def scores(self, loss: LossOptions) -> tuple[Tensor, Tensor]:
        """s(w) and s(l), (P,) each, with the score s of f_divergence_type."""
        score = DIVERGENCES[loss.f_divergence_type]
        alpha = loss.f_alpha_divergence_coef
        return score(self.chosen, alpha), score(self.rejected, alpha)

    def margin(self, loss: LossOptions) -> Tensor:
        """βΔ = β·(s(w) − s(l)), less the column `margin` where there is one: (P,)."""
        chosen, rejected = self.scores(loss)
        margin = self.beta * (chosen - rejected)
        return margin if self.offset is None else margin - self.offset

    def mean_scores(self, loss: LossOptions) -> Tensor:
        """s(w)/n_w − s(l)/n_l: (P,)."""
        chosen, rejected = self.scores(loss)
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens

    def chosen_nll(self) -> Tensor:
        """Negative log-likelihood of the chosen response per token: (P,)."""
        return -self.chosen_sum / self.chosen_tokens


@dataclass(frozen=True)
class Lists:
    """What a list kind reads of P lists of up to K responses, best first: tensors (P, K) in float32 or float64.

    A pair is a list of two, of ranks 0 and 1.

    Attributes:
        policy, ref: log-probs under policy and reference, nats, summed over tokens; ref is 0 without a reference, both
            are 0 where a list has fewer responses.
        tokens: the responses' token counts, with token weights their sums, 1 in place of 0; NaN where the loss does
            not need them.
        member: bool, False where a list has fewer responses.
        ranks: int64 on the CPU, from 0, which is the best; equal ranks are ties; -1 where a list has fewer responses.
        scores: scores of the responses, 0 where a list has fewer; None where the data have none.
        beta: β, the option, or the column as (P, 1).
    """

    policy: Tensor
    ref: Tensor
    tokens: Tensor
    member: Tensor
    ranks: Tensor
    scores: Tensor | None
    beta: Tensor | float

    @property
    def rewards(self) -> Tensor:
        """s = β·(policy − ref): (P, K), 0 where a list has fewer responses."""
        return self.beta * (self.policy - self.ref)


@dataclass(frozen=True)
class StepTotals:
    """Sums over a whole optimizer step, of which a call may see one micro-batch; preference_loss documents the three.

    Raises:
        ValueError: num_pairs or num_chosen_tokens is no integer of 1 or more (a tensor is not looked at). The latter
            may also be a float above 0: with token weights, it is the sum of those of the chosen responses.
    """

    num_pairs: int
    num_chosen_tokens: float | Tensor | None = None
    earlier_rewards: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the divisors: 0 or a negative number would reverse the gradient without an error."""
        for name in ("num_pairs", "num_chosen_tokens"):
            value = getattr(self, name)
            if isinstance(value, Tensor) or (name == "num_chosen_tokens" and value is None):
                continue
            if name == "num_chosen_tokens" and isinstance(value, float):
                if not 0 < value < math.inf:
                    raise ValueError(f"{name}: expected a sum of token weights above 0, got {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r}")

    def make_pairs(
        self,
        policy: Tensor,
        ref: Tensor,
        lengths: Tensor | None,
        loss: LossOptions,
        columns: PreferenceColumns,
        chosen_sum: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Pairs:
        """Return the Pairs of P pairs.

        policy, ref and lengths are (P, 2), chosen and rejected: log-probs in nats and token counts; chosen_sum and
        weights are (P,), as in Pairs, the latter without the column `weight`. Without lengths the kinds that divide by
        them get NaN.
        """

        def column(values: Tensor) -> Tensor:
            return values.to(policy.device, policy.dtype)

        if columns.weight is not None:
            weights = column(columns.weight) if weights is None else weights * column(columns.weight)
        # On the CPU without lengths: a scalar there costs no kernel launch.
        tokens = torch.full((2,), torch.nan) if lengths is None else at_least_one_token(lengths.to(policy.dtype)).T
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
            beta=loss.beta if columns.beta is None else column(columns.beta),
            label_smoothing=(
                loss.label_smoothing if columns.label_smoothing is None else column(columns.label_smoothing)
            ),
            offset=None if columns.margin is None else column(columns.margin),
        )


def make_lists(
    logps: Tensor,
    ref: Tensor,
    lengths: Tensor | None,
    pairs: Tensor,
    loss: LossOptions,
    columns: PreferenceColumns,
) -> Lists:
    """Return the Lists of columns.lists, or of the pairs where there are none.

    Args:
        logps, ref: (S,) log-probs of every sequence under policy and reference, nats.
        lengths: (S,) token counts, or None; the loss then gets NaN.
        pairs: (P, 2) integer on the CPU, chosen and rejected sequence.
        loss: its beta is used where there is no column.
        columns: the optional columns.
    """
    lists = pairs if columns.lists is None else columns.lists
    ranks = torch.tensor([0, 1]).expand(len(lists), 2) if columns.ranks is None else columns.ranks.long()
    member = (lists >= 0).to(logps.device, non_blocking=True)
    beta = loss.beta if columns.beta is None else columns.beta.to(logps.device, logps.dtype)[:, None]
    tokens = torch.full((), torch.nan)
    if lengths is not None:
        tokens = at_least_one_token(lengths.to(logps.dtype))[side_indices(lists.clamp(min=0), logps.device)]
    scores = None if columns.scores is None else columns.scores.to(logps.device, logps.dtype)
    return Lists(of_lists(logps, lists), of_lists(ref, lists), tokens, member, ranks, scores, beta)
