"""Diagnose a run from its logs and its held-out pairs: warnings, each with advice.

Each check tests for one problem, with its thresholds as constants here, and returns a Finding or None. Logs are
Trainer's log_history: mappings with `step`, training logs with `loss`, evaluations with `eval_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpofast.evaluation.pair_records import PairTable
from dpofast.evaluation.statistics import LengthStatistics, length_statistics, share

Log = Mapping[str, Any]

# Fewer held-out pairs say nothing about shares and correlations.
LEAST_PAIRS = 20
# Pearson's r of margin and length difference: beyond 0.3 length alone explains a tenth of the margin's variance; it
# must also pass twice its own standard error, 2/√P.
LENGTH_CORRELATION = 0.3
# Between the accuracies where the chosen response is the longer one and where it is the shorter one.
LENGTH_ACCURACY_GAP = 0.15
# With fewer pairs whose chosen response is the longer (the shorter) one, that side's accuracy says nothing.
LEAST_OF_A_SIDE = 5
# Share of pairs whose chosen response is less likely than under the reference.
DISPLACED = 0.5
# ... and by how much, nats a response on average: less is noise.
DISPLACED_NATS = 0.5
# The last held-out loss above the lowest one: as a share of it, and in nats.
OVERFIT_SHARE, OVERFIT_NATS = 0.05, 0.02
# Policy minus reference log-prob, nats per token: every token is e times as likely, or as unlikely, on average.
KL_PER_TOKEN = 1.0
# The training loss has moved if it fell by this share of its first value, or of ln 2: of what a preference alone begins
# with, since an NLL term may be several times as large. Fewer than LEAST_LOGS logs decide nothing.
LOSS_FALL, LEAST_LOGS = 0.02, 6
# Share of responses that were cut to max_length.
TRUNCATED = 0.05
# Training accuracy and mean margin beyond which σ(−margin), the weight of a pair's gradient, is below 1 %.
SATURATED_ACCURACY, SATURATED_MARGIN = 0.98, 4.6


@dataclass(frozen=True)
class Finding:
    """A warning: the check's name, a title, a text with the numbers and what they mean, and advice on what to try."""

    name: str
    title: str
    text: str
    advice: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The data of a run that the checks use.

    history: the logs, in order; pairs: the last evaluation's, or None; with_reference: whether rewards are against a
    reference; per_token: whether the loss compares log-probs per token; beta, learning_rate, epochs: of the settings;
    responses, truncated: those trained on, and those of them that were cut to max_length; prefix: of the evaluation's
    metrics, where there are several; compared: the pairs with the rewards that the loss compares, per token or summed;
    length: what those have to do with length.
    """

    history: Sequence[Log]
    pairs: PairTable | None = None
    with_reference: bool = True
    per_token: bool = False
    beta: float = 0.1
    learning_rate: float = 1e-6
    epochs: float = 1.0
    responses: int = 0
    truncated: int = 0
    prefix: str = "eval"
    compared: PairTable | None = field(init=False)
    length: LengthStatistics | None = field(init=False)

    def __post_init__(self) -> None:
        """Derive the compared rewards and the length statistics."""
        compared = self.pairs
        if compared is not None and self.per_token:
            compared = replace(compared, rewards=compared.rewards / compared.lengths)
        enough = compared is not None and len(compared) >= LEAST_PAIRS
        object.__setattr__(self, "compared", compared)
        object.__setattr__(self, "length", length_statistics(compared) if enough and compared else None)

    def trained(self, name: str = "loss") -> list[tuple[int, float]]:
        """Returns (step, value) of the training logs that have a finite value of this name."""
        return _series(self.history, "loss", name)

    def held_out(self, name: str = "loss") -> list[tuple[int, float]]:
        """Returns the same of the evaluations; the name is without their prefix."""
        return _series(self.history, f"{self.prefix}_loss", f"{self.prefix}_{name}")

    def last(self, name: str) -> float | None:
        """Returns the last held-out value; without evaluations the mean of the last fifth of the training logs."""
        if values := self.held_out(name):
            return values[-1][1]
        trained = self.trained(name)
        return _tail_mean(trained) if trained else None


def _series(history: Sequence[Log], mark: str, name: str) -> list[tuple[int, float]]:
    found = [(entry.get("step", 0), entry.get(name)) for entry in history if mark in entry]
    return [(step, value) for step, value in found if isinstance(value, (int, float)) and math.isfinite(value)]


def _tail_mean(values: Sequence[tuple[int, float]]) -> float:
    return _mean(values[-max(1, len(values) // 5) :])


def _mean(values: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in values) / len(values)


def diagnose(run: Run) -> list[Finding]:
    """Returns the warnings of all CHECKS, in their order."""
    return [warning for check in CHECKS if (warning := check(run)) is not None]


def not_finite(run: Run) -> Finding | None:
    """A logged number is NaN or infinite."""
    bad = {
        name: entry.get("step", 0)
        for entry in reversed(run.history)
        for name, value in entry.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if not bad:
        return None
    name = min(bad, key=lambda key: bad[key])
    return Finding(
        "not_finite",
        "Some logged numbers are not finite",
        f"{', '.join(sorted(bad))}: first {name}, at step {bad[name]}. From there on the run may be worthless.",
        (
            f"Lower the learning rate (now {run.learning_rate:g}), or warm it up: --warmup_steps.",
            "Use --bf16 rather than --fp16, and leave --max_grad_norm at 1.",
            "Look at the pairs around that step, and at the model's own weights.",
        ),
    )


def loss_not_moving(run: Run) -> Finding | None:
    """The training loss is where it began."""
    losses = run.trained()
    if len(losses) < LEAST_LOGS:
        return None
    first, last = _mean(losses[: max(1, len(losses) // 5)]), _tail_mean(losses)
    moved = LOSS_FALL * min(abs(first), math.log(2))
    if first - last >= moved:
        return None
    risen = last - first >= moved
    rate = f"the learning rate (now {run.learning_rate:g})"
    return Finding(
        "loss_not_moving",
        "The training loss has risen" if risen else "The training loss has hardly moved",
        f"It was {first:.4f} in the first fifth of the logs and {last:.4f} in the last.",
        (
            f"Lower {rate}, or warm it up longer: --warmup_steps."
            if risen
            else f"Raise {rate}: 5e-7 to 5e-6 is usual for all weights, 1e-5 to 2e-4 for LoRA.",
            "Train longer, or with more pairs per step, so that noise does not hide the trend.",
            "Check that chosen and rejected are not swapped, and that they differ in more than noise.",
        ),
    )


def accuracy_at_chance(run: Run) -> Finding | None:
    """The implicit reward tells chosen from rejected no better than a coin."""
    if run.compared is not None and len(run.compared) >= LEAST_PAIRS:
        accuracy = share(run.compared.margins > 0)
        if accuracy.low > 0.5 or not run.trained():
            return None
        seen = (
            f"Held-out accuracy is {accuracy.value:.0%} (95 % interval {accuracy.low:.0%} to {accuracy.high:.0%}, "
            f"{accuracy.count:,} pairs)"
        )
    else:
        values = run.trained("rewards/accuracies")
        if len(values) < LEAST_LOGS or _tail_mean(values) > 0.55:
            return None
        seen = f"Training accuracy is {_tail_mean(values):.0%} in the last fifth of the logs"
    return Finding(
        "accuracy_at_chance",
        "Accuracy is no better than chance",
        f"{seen}; a coin has 50 %.",
        (
            f"Raise the learning rate (now {run.learning_rate:g}) or train longer.",
            "Look at the worst pairs below: are labels swapped, or the two responses too much alike?",
            "With noisy labels: --label_smoothing 0.1, or --loss_type robust.",
        ),
    )


def overfitting(run: Run) -> Finding | None:
    """The training margin grows while the held-out loss rises."""
    losses, margins = run.held_out(), run.trained("rewards/margins")
    if len(losses) < 3 or len(margins) < 2:
        return None
    best_step, best = min(losses, key=lambda point: point[1])
    last_step, last = losses[-1]
    before = [value for step, value in margins if step <= best_step] or [margins[0][1]]
    if last - best <= max(OVERFIT_SHARE * best, OVERFIT_NATS) or _tail_mean(margins) <= before[-1]:
        return None
    return Finding(
        "overfitting",
        "The run overfits",
        f"The held-out loss was lowest at step {best_step} ({best:.4f}) and is {last:.4f} at step {last_step}, while "
        f"the training margin went on growing, from {before[-1]:.2f} to {_tail_mean(margins):.2f}.",
        (
            "Keep the best checkpoint: --load_best_model_at_end, or stop there: --early_stopping_patience 3.",
            f"Fewer epochs (now {run.epochs:g}; one is often enough), or a lower learning rate.",
            f"A larger --beta (now {run.beta:g}) holds the model closer to its reference.",
        ),
    )


def likelihood_displacement(run: Run) -> Finding | None:
    """Most chosen responses became less likely than under the reference (arXiv 2410.08847)."""
    displaced, reward, margin = (run.last(n) for n in ("displacement", "rewards/chosen", "rewards/margins"))
    if not run.with_reference or displaced is None or reward is None:
        return None
    if displaced <= DISPLACED or reward / run.beta > -DISPLACED_NATS:
        return None
    moved = "grew because the rejected ones fell faster" if margin is None or margin > 0 else "shrank all the same"
    return Finding(
        "likelihood_displacement",
        "Chosen responses became less likely",
        f"{displaced:.0%} of the chosen responses are less likely than under the reference; the mean over all is "
        f"{-reward / run.beta:.1f} nats less. The margin {moved}; the "
        "probability went to responses that nobody compared.",
        (
            "Add the chosen response's likelihood to the loss: --rpo_alpha 1 (RPO).",
            f"A larger --beta (now {run.beta:g}), a lower learning rate, or fewer epochs.",
            "Look for pairs whose two responses are nearly the same: they push hardest in this direction.",
        ),
    )


def length_bias(run: Run) -> Finding | None:
    """The implicit reward follows the length of the response, or the pairs cannot show whether it does."""
    length = run.length
    if length is None or run.compared is None:
        return None
    sides = (length.accuracy_chosen_longer, length.accuracy_chosen_shorter)
    if min(side.count for side in sides) < LEAST_OF_A_SIDE:
        return _one_sided_length(run, length, len(run.compared))
    r, (longer, shorter) = length.margin_correlation, sides
    if not _follows_length(r, len(run.compared)):
        return None
    if not (longer.value - shorter.value) * math.copysign(1, r) > LENGTH_ACCURACY_GAP:
        return None
    return _length_finding(
        run,
        f"The model prefers the {'longer' if r > 0 else 'shorter'} response",
        f"{_margin(run)} and length difference correlate with r = {r:+.2f}; accuracy is {longer.value:.0%} where the "
        f"chosen response is the longer one and {shorter.value:.0%} where it is the shorter one (length-balanced: "
        f"{length.accuracy_balanced:.0%}).",
        f"Balance the data: the chosen response is the longer one in {length.chosen_longer:.0%} of these pairs.",
    )


def _one_sided_length(run: Run, length: LengthStatistics, count: int) -> Finding | None:
    """The chosen response is always the longer one, or always the shorter one, so accuracy is accuracy about length."""
    longer = length.accuracy_chosen_longer.count >= length.accuracy_chosen_shorter.count
    side = length.accuracy_chosen_longer if longer else length.accuracy_chosen_shorter
    # Most pairs being of equal length, their accuracy counts; a model that is right by chance prefers neither length.
    if side.count <= count / 2 or side.low <= 0.5:
        return None
    which, r = "longer" if longer else "shorter", length.margin_correlation
    # The margin grows with the difference in length where r has the sign of that difference.
    grows = _follows_length(r, count) and (r > 0) == longer
    correlate = f", and {_margin(run).lower()} and length difference correlate with r = {r:+.2f}" if grows else ""
    return _length_finding(
        run,
        f"The model prefers the {which} response" if grows else "Accuracy cannot be told from a preference for length",
        f"The chosen response is the {which} one in {side.count:,} of {count:,} pairs{correlate}: a model that looks "
        f"at length alone is right in all of these, and the accuracy of {side.value:.0%} may be that and nothing else.",
        f"Hold out pairs whose chosen response is the {'shorter' if longer else 'longer'} one, and train on some.",
    )


def _follows_length(r: float, count: int) -> bool:
    return abs(r) >= max(LENGTH_CORRELATION, 2 / math.sqrt(count))  # False for NaN


def _margin(run: Run) -> str:
    return "Margin per token" if run.per_token else "Margin"


def _length_finding(run: Run, title: str, text: str, data: str) -> Finding:
    per_token = "Compare responses per token: --loss_type sigmoid_norm, or --loss_type simpo without a reference."
    return Finding(
        "length_bias",
        title,
        text,
        (
            "Count tokens beyond the shorter response's length less: --ld_alpha 0.5 (LD-DPO).",
            *([] if run.per_token else [per_token]),
            data,
        ),
    )


def far_from_reference(run: Run) -> Finding | None:
    """The policy is far from its reference."""
    drift = {side: run.last(f"kl/{side}") for side in ("chosen", "rejected")}
    far = {side: value for side, value in drift.items() if value is not None and abs(value) > KL_PER_TOKEN}
    if not run.with_reference or not far:
        return None
    seen = " and ".join(f"{value:+.2f} nats a token on {side} responses" for side, value in far.items())
    return Finding(
        "far_from_reference",
        "The model is far from its reference",
        f"Its log-probs differ by {seen}: text that the reference writes well may have been lost.",
        (
            f"A larger --beta (now {run.beta:g}): 0.1 to 0.5 is usual.",
            f"A lower learning rate (now {run.learning_rate:g}), or fewer epochs.",
            "Read what the model writes before using it.",
        ),
    )


def saturated(run: Run) -> Finding | None:
    """Nearly every training pair is right by a wide margin: nothing is left to learn from."""
    accuracies, margins = run.trained("rewards/accuracies"), run.trained("rewards/margins")
    if not accuracies or not margins:
        return None
    accuracy, margin = _tail_mean(accuracies), _tail_mean(margins)
    if accuracy < SATURATED_ACCURACY or margin < SATURATED_MARGIN:
        return None
    return Finding(
        "saturated",
        "Rewards are saturated",
        f"At the end {accuracy:.0%} of the training pairs are right, by a mean margin of {margin:.1f}: a pair's "
        f"gradient is weighted by σ(−margin), which is {1 / (1 + math.exp(min(margin, 700))):.1g} there.",
        (
            f"Fewer epochs (now {run.epochs:g}) or a lower learning rate: later steps only add drift.",
            "Harder pairs, whose two responses are both plausible.",
            "A loss with a bounded target: --loss_type ipo.",
        ),
    )


def truncation(run: Run) -> Finding | None:
    """Many responses lost their end to max_length."""
    if not run.responses or run.truncated / run.responses <= TRUNCATED:
        return None
    return Finding(
        "truncation",
        "Many responses were cut",
        f"{run.truncated:,} of {run.responses:,} responses ({run.truncated / run.responses:.0%}) were cut to "
        "max_length and lost their end: the model does not learn when to stop there, and two long responses may differ "
        "only beyond the cut.",
        ("Raise --max_length, or leave such pairs out.",),
    )


CHECKS: tuple[Callable[[Run], Finding | None], ...] = (
    not_finite,
    loss_not_moving,
    accuracy_at_chance,
    overfitting,
    likelihood_displacement,
    length_bias,
    far_from_reference,
    saturated,
    truncation,
)
