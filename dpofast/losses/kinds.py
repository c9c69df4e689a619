"""The loss kinds: one small function each, (Pairs, LossOptions) -> (P,) losses in nats, and KINDS, which names them.

Symbols (nats): w and l are the log-ratios log(policy/reference) of the chosen and the rejected response, p_w and p_l
the policy's log-probs alone, n_w and n_l the responses' tokens, ls = log σ. Δ = s(w) − s(l), where s is the score of
the f-divergence (divergences.py; s(u) = u by default). β = beta, ε = label_smoothing, τ = discopop_tau,
γ = simpo_gamma, λ = cpo_alpha or dpop_lambda. Gradients are left to autograd, on tensors of P numbers.

A kind is separable if a pair's loss depends on that pair alone, and coupled if it depends on all pairs of the call.
Losses of lists are in list_kinds.py, losses that users bring in own_kinds.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpofast.losses import list_kinds
from dpofast.losses.divergences import DIVERGENCES
from dpofast.losses.options import LossOptions
from dpofast.losses.pairs import Pairs


def _smoothed(margin: Tensor, flipped: Tensor | float) -> Tensor:
    """−(1−ε)·ls(margin) − ε·ls(−margin): the logistic loss if a preference is flipped with probability ε (cDPO)."""
    if not isinstance(flipped, Tensor) and flipped == 0:
        return -F.logsigmoid(margin)
    return -(1 - flipped) * F.logsigmoid(margin) - flipped * F.logsigmoid(-margin)


def _sigmoid(x: Pairs, loss: LossOptions) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7: −(1−ε)·ls(βΔ) − ε·ls(−βΔ); with ε > 0 conservative DPO."""
    return _smoothed(x.margin(loss), x.label_smoothing)


def _sigmoid_norm(x: Pairs, loss: LossOptions) -> Tensor:
    """Length-normalized DPO: sigmoid with Δ = s(w)/n_w − s(l)/n_l."""
    return _smoothed(x.beta * x.mean_scores(loss), x.label_smoothing)


def _robust(x: Pairs, loss: LossOptions) -> Tensor:
    """Robust DPO, arXiv 2403.00409: (−(1−ε)·ls(βΔ) + ε·ls(−βΔ))/(1 − 2ε).

    Its expectation is the DPO loss of the clean preferences if a share ε of them is flipped.
    """
    margin, flipped = x.margin(loss), x.label_smoothing
    clean = -(1 - flipped) * F.logsigmoid(margin)
    return (clean + flipped * F.logsigmoid(-margin)) / (1 - 2 * flipped)


def _hinge(x: Pairs, loss: LossOptions) -> Tensor:
    """The hinge loss of SLiC, arXiv 2305.10425: relu(1 − βΔ)."""
    return F.relu(1 - x.margin(loss))


def _ipo(x: Pairs, loss: LossOptions) -> Tensor:
    """IPO, arXiv 2310.12036 eq. 17: (s(w)/n_w − s(l)/n_l − 1/(2β))²; with ipo_average=False (Δ − 1/(2β))².

    The average per token is the authors' choice.
    """
    if loss.ipo_average:
        difference = x.mean_scores(loss)
    else:
        chosen, rejected = x.scores(loss)
        difference = chosen - rejected
    return (difference - 1 / (2 * x.beta)).square()


def _exo_pair(x: Pairs, loss: LossOptions) -> Tensor:
    """EXO, arXiv 2402.00856 eq. 16: σ(βΔ)·(ls(βΔ) − log(1−ε)) + σ(−βΔ)·(ls(−βΔ) − log ε).

    The KL divergence from the policy's preference (σ(βΔ), σ(−βΔ)) to the label (1−ε, ε).
    """
    margin, flipped = x.margin(loss), x.label_smoothing
    if isinstance(flipped, Tensor):
        log_right: Tensor | float = (-flipped).log1p()
        log_wrong: Tensor | float = flipped.log()
    else:
        log_right, log_wrong = math.log1p(-flipped), math.log(flipped)
    right = margin.sigmoid() * (F.logsigmoid(margin) - log_right)
    return right + (-margin).sigmoid() * (F.logsigmoid(-margin) - log_wrong)


def _nca_pair(x: Pairs, loss: LossOptions) -> Tensor:
    """NCA, arXiv 2402.05369: −ls(βw) − ½·ls(−βw) − ½·ls(−βl)."""
    chosen, rejected = x.beta * x.chosen, x.beta * x.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(x: Pairs, loss: LossOptions) -> Tensor:
    """BCO, arXiv 2404.04656: −ls(βw − δ) − ls(−(βl − δ)), δ the mean of all rewards so far, or 0."""
    chosen, rejected = x.beta * x.chosen, x.beta * x.rejected
    shift: Tensor | float = 0.0
    if loss.bco_delta == "running_mean":
        total, count = (0.0, 0.0) if x.earlier_rewards is None else x.earlier_rewards.unbind()
        now = (chosen.detach().double() + rejected.detach().double()).sum()
        shift = ((total + now) / (count + 2 * len(chosen))).to(chosen.dtype)
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(-(rejected - shift))


def _sppo_hard(x: Pairs, loss: LossOptions) -> Tensor:
    """SPPO with hard labels, arXiv 2405.00675: (w − 1/(2β))² + (l + 1/(2β))²."""
    target = 1 / (2 * x.beta)
    return (x.chosen - target).square() + (x.rejected + target).square()


def _cal_dpo(x: Pairs, loss: LossOptions) -> Tensor:
    """Cal-DPO, arXiv 2412.14516: −ls(w − l) + ½·((w − 1/(2β))² + (l + 1/(2β))²)."""
    return -F.logsigmoid(x.chosen - x.rejected) + 0.5 * _sppo_hard(x, loss)


def _quantile_differences(upper: Tensor, lower: Tensor) -> Tensor:
    """upper (P,) minus the value of the same rank in lower (P,), in the order of upper: (P,)."""
    ranks = upper.detach().argsort(stable=True).argsort(stable=True)
    return upper - lower.sort().values[ranks]


def _aot(x: Pairs, loss: LossOptions) -> Tensor:
    """AOT, arXiv 2406.05882: sigmoid with the quantile differences sort(p_w − p_l) − sort(r_w − r_l) as Δ.

    r_w and r_l are the reference's log-probs; sorted over all pairs of the call.
    """
    policy = x.policy_chosen - x.policy_rejected
    return _smoothed(x.beta * _quantile_differences(policy, x.ref_chosen - x.ref_rejected), x.label_smoothing)


def _aot_unpaired(x: Pairs, loss: LossOptions) -> Tensor:
    """AOT for unpaired data, arXiv 2406.05882: sigmoid with sort(w) − sort(l) as Δ, over all pairs of the call."""
    return _smoothed(x.beta * _quantile_differences(x.chosen, x.rejected), x.label_smoothing)


def _apo_zero(x: Pairs, loss: LossOptions) -> Tensor:
    """APO-zero, arXiv 2408.06266 eq. 7: 1 − σ(βw) + σ(βl)."""
    return (-x.beta * x.chosen).sigmoid() + (x.beta * x.rejected).sigmoid()


def _apo_down(x: Pairs, loss: LossOptions) -> Tensor:
    """APO-down, arXiv 2408.06266 eq. 8: σ(βw) + 1 − σ(β(w − l))."""
    return (x.beta * x.chosen).sigmoid() + (-x.beta * (x.chosen - x.rejected)).sigmoid()


def _discopop(x: Pairs, loss: LossOptions) -> Tensor:
    """DiscoPOP, arXiv 2406.08414 eq. 5: −ls(u)(1 − m) + e^(−u)·m with u = βΔ, m = σ(u/τ).

    e^(−u)·m is one exponential here: apart they are inf·0 for a pair that is lost by far.
    """
    margin = x.margin(loss)
    modulation = margin / loss.discopop_tau
    return -F.logsigmoid(margin) * (-modulation).sigmoid() + (F.logsigmoid(modulation) - margin).exp()


def _sft(x: Pairs, loss: LossOptions) -> Tensor:
    """Negative log-likelihood of the chosen responses, averaged over all chosen tokens of the step.

    Per pair it is −p_w · (pairs of the step)/(chosen tokens of the step), so that the mean over pairs is that average.
    """
    return -x.chosen_sum * x.nll_scale


def _simpo(x: Pairs, loss: LossOptions) -> Tensor:
    """SimPO, arXiv 2405.14734: −ls(β(p_w/n_w − p_l/n_l) − γ)."""
    difference = x.policy_chosen / x.chosen_tokens - x.policy_rejected / x.rejected_tokens
    return -F.logsigmoid(x.beta * difference - loss.simpo_gamma)


def _alpha_po(x: Pairs, loss: LossOptions) -> Tensor:
    """AlphaPO, arXiv 2501.03884: −ls(ρ(p_w/n_w) − ρ(p_l/n_l) − γ) with ρ(u) = β·(1 − e^(−αu))/α; α → 0 gives simpo.

    α = alpha_po_alpha, γ = simpo_gamma. ρ/β is the score of the alpha divergence 1 − α, its exponent clamped alike.
    """
    score, alpha = DIVERGENCES["alpha_divergence"], 1 - loss.alpha_po_alpha
    chosen, rejected = x.policy_chosen / x.chosen_tokens, x.policy_rejected / x.rejected_tokens
    return -F.logsigmoid(x.beta * (score(chosen, alpha) - score(rejected, alpha)) - loss.simpo_gamma)


def _log_odds(mean_logp: Tensor) -> Tensor:
    """log(p/(1−p)) for p = e^mean_logp; mean_logp is clamped to at most −eps, since the odds of p = 1 are infinite."""
    below_one = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return mean_logp - (-torch.expm1(below_one)).log()


def _orpo(x: Pairs, loss: LossOptions) -> Tensor:
    """ORPO, arXiv 2403.07691: −p_w/n_w − λ·ls(log-odds(p_w/n_w) − log-odds(p_l/n_l)), λ = β as in TRL."""
    chosen = _log_odds(x.policy_chosen / x.chosen_tokens)
    rejected = _log_odds(x.policy_rejected / x.rejected_tokens)
    return x.chosen_nll() - x.beta * F.logsigmoid(chosen - rejected)


def _cpo(x: Pairs, loss: LossOptions) -> Tensor:
    """CPO, arXiv 2401.08417: −ls(β(p_w − p_l)) − λ·p_w/n_w, λ = cpo_alpha."""
    preference = -F.logsigmoid(x.beta * (x.policy_chosen - x.policy_rejected))
    return preference + loss.cpo_alpha * x.chosen_nll() if loss.cpo_alpha else preference


def _dpop(x: Pairs, loss: LossOptions) -> Tensor:
    """DPO-Positive, arXiv 2402.13228 eq. 3: −ls(β(w − l − λ·max(0, −w))), λ = dpop_lambda."""
    # relu, whose derivative at 0 is 0: there every pair stands in the first step
    return -F.logsigmoid(x.beta * (x.chosen - x.rejected - loss.dpop_lambda * F.relu(-x.chosen)))


def _beta_dpo(x: Pairs, loss: LossOptions) -> Tensor:
    """β-DPO, arXiv 2407.08639: −ls(β'·(w − l)) with β' = β·(1 + α·(mean of all β(w − l) − M₀)), without gradient.

    α = beta_dpo_alpha, M₀ = beta_dpo_threshold; β' is at least 1e-3, as in the authors' code. A column beta takes the
    place of both β: the factor is one for the step, and scales every pair's own.
    """
    difference = x.chosen - x.rejected
    surplus = (x.beta * difference).detach().mean() - loss.beta_dpo_threshold
    return -F.logsigmoid((x.beta * (1 + loss.beta_dpo_alpha * surplus)).clamp(min=1e-3) * difference)


def _kto_pair(x: Pairs, loss: LossOptions) -> Tensor:
    """KTO on pairs, arXiv 2402.01306: 1 − σ(β(w − KL)) + 1 − σ(β(KL − l)), KL = max(0, mean of all w and l)."""
    divergence = ((x.chosen + x.rejected).mean() / 2).clamp(min=0).detach()
    chosen = (-x.beta * (x.chosen - divergence)).sigmoid()
    return chosen + (-x.beta * (divergence - x.rejected)).sigmoid()


@dataclass(frozen=True)
class Kind:
    """A loss function and what it needs.

    Attributes:
        function: (Pairs, LossOptions) -> (P,) losses in nats.
        reference: whether it needs reference log-probs.
        coupled: whether a pair's loss depends on the other pairs.
        divergence: whether f_divergence_type changes it.
        lengths: whether it needs n_w and n_l; an option's name, where it needs them unless that is 0 or False.
        smoothing: the range of label_smoothing, a key of SMOOTHING_RANGES; None if it is not used.
        options: fields of LossOptions that it reads beside the shared ones.
        nll: whether it contains an NLL term of the chosen response.
        per_token: whether it compares the responses' log-probs per token.
        margin: whether it takes the column `margin`.
        lists: whether it is a loss of lists: function is then (Lists, LossOptions) -> (P,).
        scores: of a loss of lists, whether lists need scores; pairs, which have none, do without.
    """

    function: Callable[[Any, Any], Tensor]
    reference: bool = True
    coupled: bool = False
    divergence: bool = False
    lengths: bool | str = False
    smoothing: str | None = None
    options: tuple[str, ...] = ()
    nll: bool = False
    per_token: bool = False
    margin: bool = False
    lists: bool = False
    scores: bool = False

    def needs_lengths(self, loss: LossOptions) -> bool:
        """Whether it needs n_w and n_l with these options."""
        return bool(getattr(loss, self.lengths)) if isinstance(self.lengths, str) else self.lengths


SMOOTHING_RANGES: dict[str, Callable[[float], bool]] = {
    "[0, 0.5]": lambda e: 0 <= e <= 0.5,
    "[0, 0.5)": lambda e: 0 <= e < 0.5,
    "(0, 1)": lambda e: 0 < e < 1,
}

KINDS: dict[str, Kind] = {
    "sigmoid": Kind(_sigmoid, divergence=True, smoothing="[0, 0.5]", margin=True),
    "sigmoid_norm": Kind(_sigmoid_norm, divergence=True, lengths=True, smoothing="[0, 0.5]", per_token=True),
    "robust": Kind(_robust, divergence=True, smoothing="[0, 0.5)"),
    "hinge": Kind(_hinge, divergence=True, margin=True),
    "ipo": Kind(_ipo, divergence=True, lengths="ipo_average", options=("ipo_average",), per_token=True),
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
    "cpo": Kind(_cpo, reference=False, lengths="cpo_alpha", options=("cpo_alpha",), nll=True),
    "alpha_po": Kind(
        _alpha_po, reference=False, lengths=True, options=("alpha_po_alpha", "simpo_gamma"), per_token=True
    ),
    "dpop": Kind(_dpop, options=("dpop_lambda",)),
    "beta_dpo": Kind(_beta_dpo, coupled=True, options=("beta_dpo_alpha", "beta_dpo_threshold")),
    "plackett_luce": Kind(list_kinds.plackett_luce, lists=True),
    "softmax_dpo": Kind(list_kinds.softmax_dpo, lists=True),
    "infonca": Kind(list_kinds.infonca, lists=True, scores=True, options=("score_temperature",)),
    "nca": Kind(list_kinds.nca, lists=True, scores=True, options=("score_temperature",)),
    "lipo_lambda": Kind(list_kinds.lipo_lambda, lists=True, scores=True, options=("score_temperature",)),
}

# What is often written for them, in messages about an unknown name.
KINDS_ALSO_CALLED = {
    "dpo": "sigmoid (DPO's own loss)",
    "cdpo": "sigmoid with label_smoothing",
    "rpo": "sigmoid with rpo_alpha",
    "ld_dpo": "sigmoid with ld_alpha",
    "wpo": "sigmoid with use_weighting",
    "nll": "sft",
    "odpo": "sigmoid with a column margin",
    "alphapo": "alpha_po",
    "betadpo": "beta_dpo",
    "listmle": "plackett_luce",
    "sdpo": "softmax_dpo",
    "lipo": "lipo_lambda",
}
