"""PreferenceLoss: which preference loss, and its options, validated when built."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field

from dpofast.common.names import did_you_mean
from dpofast.losses.divergences import DIVERGENCES
from dpofast.losses.kinds import KINDS, KINDS_ALSO_CALLED, SMOOTHING_RANGES
from dpofast.losses.options import LossOptions
from dpofast.losses.own_kinds import admit, is_own, kind_of, name_of

_NUMBERS = (
    "beta",
    "label_smoothing",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "rpo_alpha",
    "discopop_tau",
    "simpo_gamma",
    "cpo_alpha",
    "alpha_po_alpha",
    "dpop_lambda",
    "beta_dpo_alpha",
    "beta_dpo_threshold",
    "score_temperature",
)
# Options that only some kinds read; any other value than the default needs a kind that does.
_OWN_OPTIONS = (
    *("ipo_average", "bco_delta", "discopop_tau", "simpo_gamma", "cpo_alpha", "alpha_po_alpha", "dpop_lambda"),
    *("beta_dpo_alpha", "beta_dpo_threshold", "score_temperature"),
)


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(LossOptions):
    """Which loss, and its options; validated when built. A mix shares its options: each kind takes those it has.

    Args:
        kind: one of dpofast.losses.kinds.KINDS (formulas there), default "sigmoid" (DPO); a function of your own
            (own_kinds.preference_kind), or its name "module:function"; or several of them: their weighted sum. Of a
            function, the name is kept.
        weights: one for each kind, default 1.
        beta: strength of the implicit KL penalty towards the reference, > 0; for "orpo" the weight of the odds ratio,
            as in TRL.
        label_smoothing: the probability ε that a preference is flipped: [0, 0.5] for "sigmoid" (conservative DPO),
            "sigmoid_norm", "aot" and "aot_unpaired", [0, 0.5) for "robust", (0, 1) for "exo_pair".
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence" (divergences.py).
        f_alpha_divergence_coef: α of "alpha_divergence", finite.
        ld_alpha: in [0, 1]; tokens beyond the length of the pair's shorter response count α times in the log-probs of
            policy and reference (LD-DPO, arXiv 2409.06411). NLL terms and lengths are left as they are.
        use_weighting: multiply a pair's loss by exp(mean over tokens of (logp − log Σp²)) of both responses, without
            gradient (WPO, arXiv 2406.11827).
        rpo_alpha: ≥ 0; adds α times minus the chosen response's log-prob per token (RPO, arXiv 2404.19733).
        ipo_average: "ipo" on log-ratios per token; False takes their sums.
        bco_delta: "zero", or "running_mean": "bco_pair" shifts by the mean of all rewards so far.
        discopop_tau: "discopop"'s τ, > 0.
        simpo_gamma: the γ of "simpo" and "alpha_po", finite.
        cpo_alpha: "cpo"'s λ, ≥ 0.
        alpha_po_alpha: "alpha_po"'s α, finite; 0 makes it "simpo".
        dpop_lambda: "dpop"'s λ, ≥ 0; 0 makes it "sigmoid".
        beta_dpo_alpha: "beta_dpo"'s α, ≥ 0; 0 makes it "sigmoid" (for a beta of 1e-3 or more).
        beta_dpo_threshold: "beta_dpo"'s M₀, finite: the mean margin of rewards at which beta is what it says.
        score_temperature: > 0; "infonca", "nca" and "lipo_lambda" divide the scores of responses by it.

    Raises:
        ValueError: an unknown kind, an option outside its range, or one that the kind does not have; a function of
            your own that is no loss (own_kinds.admit).
    """

    # The same as JSON: what an operator of torch.library, which takes no objects, is told.
    encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every option."""
        several = isinstance(self.kind, (list, tuple))
        object.__setattr__(self, "kind", tuple(map(name_of, self.kind)) if several else name_of(self.kind))
        self._check_types()
        if isinstance(self.weights, list):
            object.__setattr__(self, "weights", tuple(self.weights))
        if not self.kinds or any(kind not in KINDS and not is_own(kind) for kind in self.kinds):
            unknown = [kind for kind in self.kinds if kind not in KINDS and not is_own(kind)]
            meant = did_you_mean(unknown[0], KINDS, KINDS_ALSO_CALLED) if unknown else ""
            raise ValueError(f"kind: expected one of {sorted(KINDS)}, or several of them, got {self.kind!r}{meant}")
        self._check_ranges()
        self._check_combinations()
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        object.__setattr__(self, "encoded", json.dumps(values))
        for kind in filter(is_own, self.kinds):
            admit(kind, self, self.encoded)

    def _check_types(self) -> None:
        kinds = [self.kind] if isinstance(self.kind, str) else self.kind
        if not isinstance(kinds, (list, tuple)) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"kind: expected a name or a list of names, got {self.kind!r}")
        if self.weights is not None and not (
            isinstance(self.weights, (list, tuple)) and all(map(_is_number, self.weights))
        ):
            raise ValueError(f"weights: expected a list of numbers, one a kind, got {self.weights!r}")
        for name in ("use_weighting", "ipo_average"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if not (_is_number(value) or (value is None and name in ("ld_alpha", "rpo_alpha"))):
                raise ValueError(f"{name}: expected a number, got {value!r}")

    def _check_ranges(self) -> None:
        weights = self.kind_weights
        if len(weights) != len(self.kinds) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights: expected {len(self.kinds)} finite numbers, one a kind, got {self.weights}")
        for name, expected, holds in (
            ("beta", "a positive finite number", 0 < self.beta < math.inf),
            ("f_divergence_type", f"one of {sorted(DIVERGENCES)}", self.f_divergence_type in DIVERGENCES),
            ("f_alpha_divergence_coef", "a finite number", math.isfinite(self.f_alpha_divergence_coef)),
            ("ld_alpha", "a number in [0, 1] or None", self.ld_alpha is None or 0 <= self.ld_alpha <= 1),
            ("rpo_alpha", "0 or more, or None", self.rpo_alpha is None or 0 <= self.rpo_alpha < math.inf),
            ("bco_delta", "'zero' or 'running_mean'", self.bco_delta in ("zero", "running_mean")),
            ("discopop_tau", "a positive finite number", 0 < self.discopop_tau < math.inf),
            ("simpo_gamma", "a finite number", math.isfinite(self.simpo_gamma)),
            ("cpo_alpha", "0 or more", 0 <= self.cpo_alpha < math.inf),
            ("alpha_po_alpha", "a finite number", math.isfinite(self.alpha_po_alpha)),
            ("dpop_lambda", "0 or more", 0 <= self.dpop_lambda < math.inf),
            ("beta_dpo_alpha", "0 or more", 0 <= self.beta_dpo_alpha < math.inf),
            ("beta_dpo_threshold", "a finite number", math.isfinite(self.beta_dpo_threshold)),
            ("score_temperature", "a positive finite number", 0 < self.score_temperature < math.inf),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        ranges = {kind: kind_of(kind).smoothing for kind in self.kinds}
        for kind, allowed in ranges.items():
            if allowed is not None and not SMOOTHING_RANGES[allowed](self.label_smoothing):
                hint = column = ""
                if kind == "exo_pair":
                    hint = " (the EXO paper takes 1e-3)"
                    column = "; a column label_smoothing takes its place, but it must be in range"
                raise ValueError(
                    f"label_smoothing: expected a number in {allowed} for kind {kind!r}{hint}, "
                    f"got {self.label_smoothing}{column}"
                )
        if self.label_smoothing != 0 and not any(ranges.values()):
            self._refuse("label_smoothing", [kind for kind in KINDS if KINDS[kind].smoothing])

    def _check_combinations(self) -> None:
        """Raise ValueError for an option that has no effect with these kinds."""
        kinds = [kind_of(kind) for kind in self.kinds]
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in _OWN_OPTIONS:
            if getattr(self, name) != defaults[name] and not any(name in kind.options for kind in kinds):
                self._refuse(name, [kind for kind in KINDS if name in KINDS[kind].options])
        if self.f_alpha_divergence_coef != defaults["f_alpha_divergence_coef"]:
            if self.f_divergence_type != "alpha_divergence":
                raise ValueError(
                    f"f_alpha_divergence_coef={self.f_alpha_divergence_coef}: only for f_divergence_type="
                    f"'alpha_divergence', got {self.f_divergence_type!r}"
                )
        if self.f_divergence_type != "reverse_kl":
            # In other kinds β·log Z(x) does not cancel, so the divergence means nothing; sft has no margin at all.
            with_margin = [kind for kind in self.kinds if kind != "sft"]
            if not with_margin or not all(kind_of(kind).divergence for kind in with_margin):
                self._refuse("f_divergence_type", [kind for kind in KINDS if KINDS[kind].divergence])
        # Both speak of the two responses of a pair.
        if self.ld_alpha is not None and (self.of_lists or set(self.kinds) == {"sft"}):
            self._refuse("ld_alpha", [kind for kind in KINDS if kind != "sft" and not KINDS[kind].lists])
        if self.use_weighting and (self.of_lists or {"aot", "aot_unpaired"} & set(self.kinds)):
            taking = [kind for kind in KINDS if not kind.startswith("aot") and not KINDS[kind].lists]
            self._refuse("use_weighting", taking)
        if self.rpo_alpha is not None and any(kind.nll for kind in kinds):
            self._refuse("rpo_alpha", [kind for kind in KINDS if not KINDS[kind].nll])

    def _refuse(self, name: str, kinds: list[str]) -> None:
        raise ValueError(
            f"{name}={getattr(self, name)!r}: not for kind {self.kind!r}; the kinds that take it are {', '.join(kinds)}"
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the mix."""
        return (self.kind,) if isinstance(self.kind, str) else self.kind

    @property
    def kind_weights(self) -> tuple[float, ...]:
        """A weight for each kind."""
        return (1.0,) * len(self.kinds) if self.weights is None else self.weights

    @property
    def coupled(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the call."""
        return self.bco_delta != "zero" or any(kind_of(kind).coupled for kind in self.kinds)

    @property
    def of_lists(self) -> bool:
        """Whether it takes lists of responses; other kinds of a mix see their best and worst as a pair."""
        return any(kind_of(kind).lists for kind in self.kinds)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs are needed."""
        return any(kind_of(kind).reference for kind in self.kinds)

    @property
    def needs_lengths(self) -> bool:
        """Whether the responses' token counts are needed."""
        modified = self.ld_alpha is not None or self.use_weighting or self.rpo_alpha is not None
        return modified or any(kind_of(kind).needs_lengths(self) for kind in self.kinds)

    @property
    def counts_step_tokens(self) -> bool:
        """Whether it may read Pairs.nll_scale, for which the chosen tokens of the whole call are counted."""
        return any(kind == "sft" or (is_own(kind) and kind_of(kind).lengths) for kind in self.kinds)

    @property
    def per_token(self) -> bool:
        """Whether every kind that compares responses compares their log-probs per token."""
        compared = [kind_of(kind) for kind in self.kinds if kind != "sft"]
        return bool(compared) and all(kind.per_token and kind.needs_lengths(self) for kind in compared)

    @staticmethod
    def decode(encoded: str) -> PreferenceLoss:
        """Return the PreferenceLoss that `encoded` was made from; ValueError where its function is not known here."""
        return PreferenceLoss(**json.loads(encoded))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checked_loss(loss: PreferenceLoss | None) -> PreferenceLoss:
    """The loss, or DPO's where there is none; TypeError for anything else."""
    if loss is not None and not isinstance(loss, PreferenceLoss):
        raise TypeError(f"loss: expected a PreferenceLoss(kind=...), got {loss!r}")
    return PreferenceLoss() if loss is None else loss
