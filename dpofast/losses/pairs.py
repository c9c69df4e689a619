"""Pairs: the tensors of P pairs that every loss reads; StepTotals: the sums over a whole optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast.losses.divergences import DIVERGENCES
from dpofast.losses.options import LossOptions


@dataclass(frozen=True)
class Pairs:
    """What a loss kind reads of P pairs: log-probs and token counts, tensors (P,) in float32 or float64.

    Attributes:
        policy_chosen, policy_rejected: log-probs p_w and p_l under the policy, nats, summed over tokens; with ld_alpha
            weighted by it.
        ref_chosen, ref_rejected: the same under the reference, or 0 without one.
        chosen_sum: the chosen response's log-prob without ld_alpha's weights, which NLL terms take.
        chosen_tokens, rejected_tokens: n_w and n_l, at least 1; NaN where the loss does not need them.
        nll_scale: scalar, pairs over chosen tokens of the whole step: turns a mean over pairs into one over tokens.
        earlier_rewards: (2,) float64, sum and number of the rewards before this call (bco_pair's running mean).
        weights: factor of each pair for use_weighting, without gradient, or None.
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
        """βΔ = β·(s(w) − s(l)): (P,)."""
        chosen, rejected = self.scores(loss)
        return loss.beta * (chosen - rejected)

    def mean_scores(self, loss: LossOptions) -> Tensor:
        """s(w)/n_w − s(l)/n_l: (P,)."""
        chosen, rejected = self.scores(loss)
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens

    def chosen_nll(self) -> Tensor:
        """Negative log-likelihood of the chosen response per token: (P,)."""
        return -self.chosen_sum / self.chosen_tokens


@dataclass(frozen=True)
class StepTotals:
    """Sums over a whole optimizer step, of which a call may see one micro-batch; preference_loss documents the three.

    Raises:
        ValueError: num_pairs or num_chosen_tokens is no integer of 1 or more (a tensor is not looked at).
    """

    num_pairs: int
    num_chosen_tokens: int | Tensor | None = None
    earlier_rewards: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the divisors: 0 or a negative number would reverse the gradient without an error."""
        for name in ("num_pairs", "num_chosen_tokens"):
            value = getattr(self, name)
            if isinstance(value, Tensor) or (name == "num_chosen_tokens" and value is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r}")

    def make_pairs(
        self,
        policy: Tensor,
        ref: Tensor,
        lengths: Tensor | None,
        chosen_sum: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Pairs:
        """Return the Pairs of P pairs.

        policy, ref and lengths are (P, 2), chosen and rejected: log-probs in nats and token counts; chosen_sum and
        weights are (P,), as in Pairs. Without lengths the kinds that divide by them get NaN.
        """
        # On the CPU without lengths: a scalar there costs no kernel launch.
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
