"""LossOptions: the fields of PreferenceLoss as plain data, which the functions of kinds.py are typed with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Kind and options of a preference loss, not validated. PreferenceLoss (config.py) documents and checks them."""

    kind: str | tuple[str, ...] = "sigmoid"
    weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    rpo_alpha: float | None = None
    ipo_average: bool = True
    bco_delta: str = "zero"
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    alpha_po_alpha: float = 0.25
    dpop_lambda: float = 50.0
    beta_dpo_alpha: float = 0.6
    beta_dpo_threshold: float = 0.0
    score_temperature: float = 1.0
