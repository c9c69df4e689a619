"""The public side of the losses: which loss (PreferenceLoss), and the loss of sequence or token log-probs.

The losses themselves are in losses.py; what leads from tokens to pairs, and the coefficients back, in pair_terms.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpofast.divergences import DIVERGENCES
from dpofast.first_order import first_order_only
from dpofast.losses import KINDS, SMOOTHING_RANGES, Pairs, pair_losses
from dpofast.pair_terms import StepTotals, Tokens, pair_terms, pairs_of_tokens, runs_fused, side_indices
from dpofast.rows import choose_backend

# Options that only some kinds read; any other value than the default needs a kind that does.
_NUMBERS = (
    "beta",
    "label_smoothing",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "rpo_alpha",
    "discopop_tau",
    "simpo_gamma",
    "cpo_alpha",
)
_OWN_OPTIONS = ("ipo_average", "bco_delta", "discopop_tau", "simpo_gamma", "cpo_alpha")


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """Which loss, and its options; validated when built. A mix shares its options: each kind takes those it has.

    Args:
        kind: one of dpofast.losses.KINDS (formulas there), default "sigmoid" (DPO), or several: their weighted sum.
        weights: one for each kind, default 1.
        beta: strength of the pull towards the reference, > 0; for "orpo" the weight of the odds ratio, as in TRL.
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
        simpo_gamma: "simpo"'s γ, finite.
        cpo_alpha: "cpo"'s λ, ≥ 0.

    Raises:
        ValueError: an unknown kind, an option outside its range, or one that the kind does not have.
    """

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
    # The same as JSON: what an operator of torch.library, which takes no objects, is told.
    encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every option."""
        self._check_types()
        for name in ("kind", "weights"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise ValueError(f"kind: expected one of {sorted(KINDS)}, or several of them, got {self.kind!r}")
        self._check_ranges()
        self._check_combinations()
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        object.__setattr__(self, "encoded", json.dumps(values))

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
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        ranges = {kind: KINDS[kind].smoothing for kind in self.kinds}
        for kind, allowed in ranges.items():
            if allowed is not None and not SMOOTHING_RANGES[allowed](self.label_smoothing):
                hint = " (the EXO paper takes 1e-3)" if kind == "exo_pair" else ""
                raise ValueError(
                    f"label_smoothing: expected a number in {allowed} for kind {kind!r}{hint}, "
                    f"got {self.label_smoothing}"
                )
        if self.label_smoothing != 0 and not any(ranges.values()):
            self._refuse("label_smoothing", [kind for kind in KINDS if KINDS[kind].smoothing])

    def _check_combinations(self) -> None:
        """Every option either does something with the kinds or is refused."""
        kinds = [KINDS[kind] for kind in self.kinds]
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
            if not with_margin or not all(KINDS[kind].divergence for kind in with_margin):
                self._refuse("f_divergence_type", [kind for kind in KINDS if KINDS[kind].divergence])
        if self.ld_alpha is not None and set(self.kinds) == {"sft"}:
            self._refuse("ld_alpha", [kind for kind in KINDS if kind != "sft"])
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.kinds):
            self._refuse("use_weighting", [kind for kind in KINDS if not kind.startswith("aot")])
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
        return self.bco_delta != "zero" or any(KINDS[kind].coupled for kind in self.kinds)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs are needed."""
        return any(KINDS[kind].reference for kind in self.kinds)

    @property
    def needs_lengths(self) -> bool:
        """Whether the responses' token counts are needed."""
        modified = self.ld_alpha is not None or self.use_weighting or self.rpo_alpha is not None
        return modified or any(KINDS[kind].lengths for kind in self.kinds)

    @property
    def per_token(self) -> bool:
        """Whether every kind that compares responses compares their log-probs per token."""
        compared = [kind for kind in self.kinds if kind != "sft"]
        summed = "ipo" in compared and not self.ipo_average
        return bool(compared) and not summed and all(KINDS[kind].per_token for kind in compared)

    @staticmethod
    def decode(encoded: str) -> PreferenceLoss:
        """The loss that `encoded` says."""
        return PreferenceLoss(**json.loads(encoded))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checked_loss(loss: PreferenceLoss | None) -> PreferenceLoss:
    """The loss, or DPO's where there is none; TypeError for anything else."""
    if loss is not None and not isinstance(loss, PreferenceLoss):
        raise TypeError(f"loss: expected a PreferenceLoss(kind=...), got {loss!r}")
    return PreferenceLoss() if loss is None else loss


@dataclass(frozen=True)
class PreferenceOutput:
    """loss: scalar, a mean over pairs, or a sum over them divided by num_pairs; losses (P,); logps and rewards (S,).

    Only loss is differentiable. rewards = beta·(logp − ref_logp), in nats times beta, without a reference beta·logp.
    With ld_alpha a response's log-prob depends on its partner: logps and rewards are then (P, 2), chosen and rejected.
    aux_loss is a model's own auxiliary loss (mixture-of-experts balancing), differentiable, not in loss, or None.
    """

    loss: Tensor
    losses: Tensor
    logps: Tensor
    rewards: Tensor
    aux_loss: Tensor | None = None

    def of_pairs(self, name: str, pairs: Tensor) -> Tensor:
        """logps or rewards, named, of the pairs' chosen and rejected response: (P, 2)."""
        return of_pairs(getattr(self, name), pairs)


def of_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    """Values (P, 2), or those of pairs (P, 2) out of values (S,)."""
    return values if values.dim() == 2 else values[side_indices(pairs, values.device)]


def preference_loss(
    logps: Tensor,
    pairs: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: PreferenceLoss | None = None,
    lengths: Tensor | None = None,
    num_pairs: int | None = None,
    num_chosen_tokens: int | None = None,
    earlier_rewards: Tensor | None = None,
) -> PreferenceOutput:
    """The preference loss of P pairs over S sequences.

    Args:
        logps: (S,) summed log-probs under the policy, nats, differentiable.
        pairs: (P, 2) integer, chosen and rejected sequence; a sequence may stand in several pairs.
        ref_logps: (S,) the same under the reference; kinds without one only report rewards against it.
        loss: kind and options, default PreferenceLoss().
        lengths: (S,) tokens of each sequence, for the kinds that divide by them.
        num_pairs: what the sum over pairs is divided by, default P; the pairs of a whole optimizer step when these are
            one of its micro-batches.
        num_chosen_tokens: what "sft" divides by, default these pairs' chosen tokens; those of the whole step likewise.
        earlier_rewards: (2,) float64, sum and number of the rewards of earlier steps, for bco_delta="running_mean".

    Raises:
        ValueError: shapes that do not fit, no pair, something the kind needs that is missing, a loss that needs token
            log-probs (ld_alpha, use_weighting), or (on the CPU) a pair that names a missing sequence.
    """
    loss = checked_loss(loss)
    check_pairs(logps, pairs, ref_logps, loss)
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
    view = totals.view(logps[sides], ref[sides], lengths[sides] if loss.needs_lengths and lengths is not None else None)
    return _output(view, loss, totals, logps, loss.beta * (logps - ref))


def _output(view: Pairs, loss: PreferenceLoss, totals: StepTotals, logps: Tensor, rewards: Tensor) -> PreferenceOutput:
    losses = pair_losses(view, loss)
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
    num_chosen_tokens: int | None = None,
    earlier_rewards: Tensor | None = None,
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
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: as preference_loss, and a backend that cannot run here.
    """
    loss = checked_loss(loss)
    tokens = Tokens(token_logps, cu_targets, counted, log_sum_sq_probs)
    check_tokens(tokens, pairs, ref_logps, loss)
    totals = StepTotals(len(pairs) if num_pairs is None else num_pairs, num_chosen_tokens, earlier_rewards)
    if runs_fused(loss, choose_backend(backend, token_logps.device)):
        return PreferenceOutput(*_Fused.apply(token_logps, tokens, pairs, ref_logps, loss, totals))
    view, logps, rewards = pairs_of_tokens(tokens, pairs, ref_logps, loss, totals)
    return _output(view, loss, totals, logps, rewards)


class _Fused(torch.autograd.Function):
    """kernels/preference.py; its coefficients d(sum of losses)/d(token log-prob) make backward a product."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        token_logps: Tensor,
        tokens: Tokens,
        pairs: Tensor,
        ref_logps: Tensor | None,
        loss: PreferenceLoss,
        totals: StepTotals,
    ) -> tuple[Tensor, ...]:
        terms = pair_terms(tokens, pairs, ref_logps, loss, totals, "triton")
        ctx.save_for_backward(token_logps, terms.coefficients / totals.num_pairs)
        outputs = (terms.losses, terms.logps, terms.rewards)
        ctx.mark_non_differentiable(*outputs)
        return (terms.losses.sum() / totals.num_pairs, *outputs)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, coefficients = ctx.saved_tensors
        return (coefficients * grad_loss, *(None,) * 5)


def check_pairs(logps: Tensor, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss) -> None:
    """ValueError unless logps and ref_logps are (S,), pairs (P, 2) with P > 0, and (on the CPU) name sequences < S."""
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(f"logps: expected a float tensor (S,), got {logps.dtype} {tuple(logps.shape)}")
    check_pair_names(pairs, len(logps))
    check_reference(ref_logps, len(logps), len(pairs), loss)


def check_pair_names(pairs: Tensor, sequences: int) -> None:
    """ValueError unless pairs are (P, 2) integers with P > 0 that (looked at on the CPU only) name sequences."""
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ValueError(f"pairs: expected an integer tensor (P, 2), got {pairs.dtype} {tuple(pairs.shape)}")
    if len(pairs) == 0:
        raise ValueError("pairs: expected at least one pair, got none")
    if pairs.is_cpu and not torch.compiler.is_compiling():
        if not (0 <= int(pairs.min()) and int(pairs.max()) < sequences):
            raise ValueError(f"pairs: expected sequence numbers in [0, {sequences}), got {pairs.tolist()}")


def check_reference(ref_logps: Tensor | None, sequences: int, pairs: int, loss: PreferenceLoss) -> None:
    """ValueError if a kind's reference is missing, or has another shape than (S,), with ld_alpha (P, 2)."""
    if ref_logps is None:
        if loss.needs_reference:
            raise ValueError(f"ref_logps: kind {loss.kind!r} needs the reference's log-probs, got None")
        return
    shape, reason = ((sequences,), "one a sequence") if loss.ld_alpha is None else ((pairs, 2), "with ld_alpha")
    if ref_logps.shape != shape:
        raise ValueError(f"ref_logps: expected shape {shape}, {reason}, got {tuple(ref_logps.shape)}")


def check_tokens(tokens: Tokens, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss) -> None:
    """ValueError unless the loss has what it needs of the tokens, and the pairs fit them."""
    sequences = len(tokens.cu_targets) - 1
    check_pair_names(pairs, sequences)
    check_reference(ref_logps, sequences, len(pairs), loss)
    shapes = {"log_sum_sq_probs": tokens.log_sum_sq, "counted": tokens.counted}
    for name, tensor in shapes.items():
        if tensor is not None and tensor.shape != tokens.logps.shape:
            raise ValueError(f"{name}: expected shape {tuple(tokens.logps.shape)}, got {tuple(tensor.shape)}")
    if loss.use_weighting and tokens.log_sum_sq is None:
        raise ValueError(f"log_sum_sq_probs: use_weighting of kind {loss.kind!r} needs them, got None")
