"""The losses: one small function a kind, from the log-probs of P pairs to P losses; and the table that finds them.

Symbols (nats): w, l are policy minus reference log-prob of the chosen and the rejected response, p_w, p_l the policy's
alone, n_w, n_l their tokens, ls = log σ. Δ = s(w) − s(l) with the score s of divergences.py. β, ε, τ, γ, λ are the
options of PreferenceLoss. No derivative is written down: autograd takes it, on tensors of P numbers.

A kind is separable if a pair's loss depends on that pair alone, and coupled if it depends on all pairs of the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dpofast.losses.divergences import DIVERGENCES

if TYPE_CHECKING:
    from dpofast.losses.config import PreferenceLoss


@dataclass(frozen=True)
class Pairs:
    """What the losses see of P pairs; tensors are (P,), float32 or float64.

    Attributes:
        policy_chosen, policy_rejected: p_w and p_l, weighted by ld_alpha where it is set.
        ref_chosen, ref_rejected: the reference's, or 0 without one.
        chosen_sum: the chosen response's plain log-prob, which NLL terms take; p_w without ld_alpha.
        chosen_tokens, rejected_tokens: n_w and n_l, at least 1; NaN where the loss does not need them.
        nll_scale: pairs over chosen tokens, both of the whole step: makes a mean over tokens out of one over pairs.
        earlier_rewards: (2,) float64, sum and number of the rewards before this call (bco_pair's running mean).
        weights: use_weighting's factor of each pair, without gradient, or None.
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
        """w."""
        return self.policy_chosen - self.ref_chosen

    @property
    def rejected(self) -> Tensor:
        """l."""
        return self.policy_rejected - self.ref_rejected

    def scores(self, loss: PreferenceLoss) -> tuple[Tensor, Tensor]:
        """s(w) and s(l)."""
        score = DIVERGENCES[loss.f_divergence_type]
        alpha = loss.f_alpha_divergence_coef
        return score(self.chosen, alpha), score(self.rejected, alpha)

    def margin(self, loss: PreferenceLoss) -> Tensor:
        """βΔ."""
        chosen, rejected = self.scores(loss)
        return loss.beta * (chosen - rejected)

    def mean_scores(self, loss: PreferenceLoss) -> Tensor:
        """s(w)/n_w − s(l)/n_l."""
        chosen, rejected = self.scores(loss)
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens

    def chosen_nll(self) -> Tensor:
        """Minus the chosen response's log-prob per token."""
        return -self.chosen_sum / self.chosen_tokens


def _smoothed(margin: Tensor, loss: PreferenceLoss) -> Tensor:
    """−(1−ε)·ls(margin) − ε·ls(−margin)."""
    if loss.label_smoothing == 0:
        return -F.logsigmoid(margin)
    return -(1 - loss.label_smoothing) * F.logsigmoid(margin) - loss.label_smoothing * F.logsigmoid(-margin)


def _sigmoid(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7; with ε > 0 conservative DPO."""
    return _smoothed(x.margin(loss), loss)


def _sigmoid_norm(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """DPO of log-ratios per token."""
    return _smoothed(loss.beta * x.mean_scores(loss), loss)


def _robust(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """Robust DPO, arXiv 2403.00409: unbiased if a share ε of the preferences is flipped."""
    margin, flipped = x.margin(loss), loss.label_smoothing
    clean = -(1 - flipped) * F.logsigmoid(margin)
    return (clean + flipped * F.logsigmoid(-margin)) / (1 - 2 * flipped)


def _hinge(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """relu(1 − βΔ), as in SLiC, arXiv 2305.10425."""
    return F.relu(1 - x.margin(loss))


def _ipo(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """IPO, arXiv 2310.12036 eq. 17, of log-ratios per token (its authors' choice) or summed."""
    if loss.ipo_average:
        difference = x.mean_scores(loss)
    else:
        chosen, rejected = x.scores(loss)
        difference = chosen - rejected
    return (difference - 1 / (2 * loss.beta)).square()


def _exo_pair(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """EXO, arXiv 2402.00856 eq. 16: the reverse KL divergence from (1−ε, ε)."""
    margin, flipped = x.margin(loss), loss.label_smoothing
    right = margin.sigmoid() * (F.logsigmoid(margin) - math.log1p(-flipped))
    return right + (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(flipped))


def _nca_pair(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """NCA, arXiv 2402.05369: −ls(βw) − ½·ls(−βw) − ½·ls(−βl)."""
    chosen, rejected = loss.beta * x.chosen, loss.beta * x.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """BCO, arXiv 2404.04656: −ls(βw − δ) − ls(−(βl − δ)), δ the mean of all rewards so far, or 0."""
    chosen, rejected = loss.beta * x.chosen, loss.beta * x.rejected
    shift: Tensor | float = 0.0
    if loss.bco_delta == "running_mean":
        total, count = (0.0, 0.0) if x.earlier_rewards is None else x.earlier_rewards.unbind()
        now = (chosen.detach().double() + rejected.detach().double()).sum()
        shift = ((total + now) / (count + 2 * len(chosen))).to(chosen.dtype)
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(-(rejected - shift))


def _sppo_hard(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """SPPO with hard labels, arXiv 2405.00675: (w − 1/(2β))² + (l + 1/(2β))²."""
    target = 1 / (2 * loss.beta)
    return (x.chosen - target).square() + (x.rejected + target).square()


def _cal_dpo(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """Cal-DPO, arXiv 2412.14516: −ls(w − l) + ½·sppo_hard."""
    return -F.logsigmoid(x.chosen - x.rejected) + 0.5 * _sppo_hard(x, loss)


def _quantile_differences(upper: Tensor, lower: Tensor) -> Tensor:
    """Upper minus the value of equal rank in lower, in upper's order."""
    ranks = upper.detach().argsort(stable=True).argsort(stable=True)
    return upper - lower.sort().values[ranks]


def _aot(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """AOT, arXiv 2406.05882: the policy's sorted differences against the reference's."""
    policy = x.policy_chosen - x.policy_rejected
    return _smoothed(loss.beta * _quantile_differences(policy, x.ref_chosen - x.ref_rejected), loss)


def _aot_unpaired(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """AOT for unpaired data: sorted w against sorted l."""
    return _smoothed(loss.beta * _quantile_differences(x.chosen, x.rejected), loss)


def _apo_zero(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """APO-zero, arXiv 2408.06266 eq. 7: 1 − σ(βw) + σ(βl)."""
    return (-loss.beta * x.chosen).sigmoid() + (loss.beta * x.rejected).sigmoid()


def _apo_down(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """APO-down, arXiv 2408.06266 eq. 8: σ(βw) + 1 − σ(β(w − l))."""
    return (loss.beta * x.chosen).sigmoid() + (-loss.beta * (x.chosen - x.rejected)).sigmoid()


def _discopop(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """DiscoPOP, arXiv 2406.08414 eq. 5: −ls(u)(1 − m) + e^(−u)·m with u = βΔ, m = σ(u/τ).

    e^(−u)·m is one exponential here: apart they are inf·0 for a pair that is lost by far.
    """
    margin = x.margin(loss)
    modulation = margin / loss.discopop_tau
    return -F.logsigmoid(margin) * (-modulation).sigmoid() + (F.logsigmoid(modulation) - margin).exp()


def _sft(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """Minus the log-prob of the step's chosen tokens, a mean over tokens: the NLL term of a mix."""
    return -x.chosen_sum * x.nll_scale


def _simpo(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """SimPO, arXiv 2405.14734: −ls(β(p_w/n_w − p_l/n_l) − γ)."""
    difference = x.policy_chosen / x.chosen_tokens - x.policy_rejected / x.rejected_tokens
    return -F.logsigmoid(loss.beta * difference - loss.simpo_gamma)


def _log_odds(mean_logp: Tensor) -> Tensor:
    """Log of p/(1−p) for p = e^mean_logp, held below 1 by one rounding."""
    below_one = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return mean_logp - (-torch.expm1(below_one)).log()


def _orpo(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """ORPO, arXiv 2403.07691: −p_w/n_w − λ·ls(log-odds(p_w/n_w) − log-odds(p_l/n_l)), λ = β as in TRL."""
    chosen = _log_odds(x.policy_chosen / x.chosen_tokens)
    rejected = _log_odds(x.policy_rejected / x.rejected_tokens)
    return x.chosen_nll() - loss.beta * F.logsigmoid(chosen - rejected)


def _cpo(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """CPO, arXiv 2401.08417: −ls(β(p_w − p_l)) − λ·p_w/n_w, λ = cpo_alpha."""
    preference = -F.logsigmoid(loss.beta * (x.policy_chosen - x.policy_rejected))
    return preference + loss.cpo_alpha * x.chosen_nll()


def _kto_pair(x: Pairs, loss: PreferenceLoss) -> Tensor:
    """KTO on pairs, arXiv 2402.01306: 1 − σ(β(w − KL)) + 1 − σ(β(KL − l)), KL = max(0, mean of all w and l)."""
    divergence = ((x.chosen + x.rejected).mean() / 2).clamp(min=0).detach()
    chosen = (-loss.beta * (x.chosen - divergence)).sigmoid()
    return chosen + (-loss.beta * (divergence - x.rejected)).sigmoid()


@dataclass(frozen=True)
class Kind:
    """A loss and what it takes.

    Attributes:
        function: (Pairs, PreferenceLoss) -> (P,).
        reference: whether it needs reference log-probs.
        coupled: whether a pair's loss depends on the other pairs.
        divergence: whether f_divergence_type changes it.
        lengths: whether it needs n_w and n_l.
        smoothing: the range of label_smoothing, a key of SMOOTHING_RANGES; None if it is not used.
        options: further fields of PreferenceLoss that it reads.
        nll: whether it holds an NLL term of the chosen response.
        per_token: whether it compares the responses' log-probs per token.
    """

    function: Callable[[Pairs, PreferenceLoss], Tensor]
    reference: bool = True
    coupled: bool = False
    divergence: bool = False
    lengths: bool = False
    smoothing: str | None = None
    options: tuple[str, ...] = ()
    nll: bool = False
    per_token: bool = False


SMOOTHING_RANGES: dict[str, Callable[[float], bool]] = {
    "[0, 0.5]": lambda e: 0 <= e <= 0.5,
    "[0, 0.5)": lambda e: 0 <= e < 0.5,
    "(0, 1)": lambda e: 0 < e < 1,
}

KINDS: dict[str, Kind] = {
    "sigmoid": Kind(_sigmoid, divergence=True, smoothing="[0, 0.5]"),
    "sigmoid_norm": Kind(_sigmoid_norm, divergence=True, lengths=True, smoothing="[0, 0.5]", per_token=True),
    "robust": Kind(_robust, divergence=True, smoothing="[0, 0.5)"),
    "hinge": Kind(_hinge, divergence=True),
    "ipo": Kind(_ipo, divergence=True, lengths=True, options=("ipo_average",), per_token=True),
    "exo_pair": Kind(_exo_pair, divergence=True, smoothing="(0, 1)"),
    "discopop": Kind(_discopop, divergence=True, options=("discopop_tau",)),
    "nca_pair": Kind(_nca_pair),
    "bco_pair": Kind(_bco_pair, options=("bco_delta",)),
    "sppo_hard": Kind(_sppo_hard),
    "cal_dpo": Kind(_cal_dpo),
    "apo_zero": Kind(_apo_zero),
    "apo_down": Kind(_apo_down),
    "aot": Kind(_aot, coupled=True, smoothing="[0, 0.5]"),
    "aot_unpaired": Kind(_aot_unpaired, coupled=True, smoothing="[0, 0.5]"),
    "kto_pair": Kind(_kto_pair, coupled=True),
    "sft": Kind(_sft, reference=False, lengths=True, nll=True),
    "simpo": Kind(_simpo, reference=False, lengths=True, options=("simpo_gamma",), per_token=True),
    "orpo": Kind(_orpo, reference=False, lengths=True, nll=True, per_token=True),
    "cpo": Kind(_cpo, reference=False, lengths=True, options=("cpo_alpha",), nll=True),
}


def kinds_table() -> str:
    """The README's table of kinds, in Markdown."""
    lines = ["| kind | reference | options | plan of a trained head |", "|---|---|---|---|"]
    for name, kind in KINDS.items():
        options = ["beta"] if name != "sft" else []
        options += ["label_smoothing"] if kind.smoothing else []
        options += ["f_divergence_type"] if kind.divergence else []
        options += kind.options
        if kind.coupled:
            plan = "coupled: keep and recompute"
        elif "bco_delta" in kind.options:
            plan = "separable: 3 GEMMs; coupled with `bco_delta='running_mean'`"
        else:
            plan = "separable: 3 GEMMs"
        shown = ", ".join(f"`{option}`" for option in options)
        lines.append(f"| `{name}` | {'needed' if kind.reference else 'not used'} | {shown} | {plan} |")
    return "\n".join(lines)
