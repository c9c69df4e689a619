"""Accuracy and margins of an implicit reward with 95 % intervals, and statistics of its dependence on response length.

The implicit reward (arXiv 2305.18290, section 4) of a response is beta · (policy − reference log-prob). A pair is
classified correctly if the chosen response has the larger reward; a tie is not correct.

Preferences correlate with length (arXiv 2310.03716), so a reward may be accurate only because it prefers longer
responses. The length-balanced accuracy is the mean of two accuracies: over the pairs whose chosen response is longer,
and over those whose chosen response is shorter. It is the balanced accuracy (Brodersen et al. 2010,
doi 10.1109/ICPR.2010.764) with these two kinds of pairs as classes: a reward that always prefers the longer response
gets exactly one half, in any mixture of the two kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpofast.evaluation.pair_records import PairTable

_Z95 = 1.959963984540054  # of the standard normal distribution, two-sided
LENGTH_METRICS = (
    "length/accuracy_chosen_longer",
    "length/accuracy_chosen_shorter",
    "length/accuracy_balanced",
    "length/longer_preferred",
    "length/margin_correlation",
    "lengths/preferred",
)


@dataclass(frozen=True)
class Estimate:
    """A statistic over `count` pairs with its 95 % interval [low, high].

    All are NaN without pairs; with one pair the interval of a mean is NaN.
    """

    value: float
    low: float
    high: float
    count: int


def share(right: np.ndarray) -> Estimate:
    """Return the share of True among (P,) booleans with its Wilson interval (Wilson 1927)."""
    count = len(right)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p, spread = float(right.mean()), _Z95**2 / count
    center = (p + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    # At p = 0 and p = 1 one bound equals p up to rounding.
    return Estimate(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)), count)


def mean(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Return the mean of (P,) numbers with its percentile bootstrap interval (Efron 1979), deterministic given seed."""
    count = len(values)
    if count < 2:  # a bootstrap of one value has no spread
        return Estimate(float(values[0]) if count else math.nan, math.nan, math.nan, count)
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(count, size=count)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), count)


@dataclass(frozen=True)
class LengthStatistics:
    """How a reward depends on response length, over the pairs of a PairTable. NaN where no pair qualifies.

    Attributes:
        accuracy_chosen_longer: accuracy over the pairs whose chosen response has more tokens.
        accuracy_chosen_shorter: accuracy over the pairs whose chosen response has fewer tokens.
        chosen_longer: share of pairs whose chosen response is longer, among pairs of unequal lengths.
        longer_preferred: share of pairs of unequal lengths whose longer response has the larger reward, without ties.
        margin_correlation: Pearson correlation of the margin with chosen minus rejected tokens.
        preferred_length: mean tokens of the response with the larger reward.
    """

    accuracy_chosen_longer: Estimate
    accuracy_chosen_shorter: Estimate
    chosen_longer: float
    longer_preferred: Estimate
    margin_correlation: float
    preferred_length: float

    @property
    def accuracy_balanced(self) -> float:
        """The length-balanced accuracy: the mean of the two accuracies."""
        return (self.accuracy_chosen_longer.value + self.accuracy_chosen_shorter.value) / 2

    @property
    def accuracy_balanced_interval(self) -> tuple[float, float]:
        """95 % interval of accuracy_balanced: half the root of the summed squares of the two Wilson half-widths.

        The two accuracies are over disjoint sets of pairs, so their errors are independent.
        """
        both = (self.accuracy_chosen_longer, self.accuracy_chosen_shorter)
        below = math.hypot(*(part.value - part.low for part in both)) / 2
        above = math.hypot(*(part.high - part.value for part in both)) / 2
        return self.accuracy_balanced - below, self.accuracy_balanced + above

    def metrics(self) -> dict[str, float]:
        """Return LENGTH_METRICS by name for logging, without NaN values."""
        values = (
            self.accuracy_chosen_longer.value,
            self.accuracy_chosen_shorter.value,
            self.accuracy_balanced,
            self.longer_preferred.value,
            self.margin_correlation,
            self.preferred_length,
        )
        named = zip(LENGTH_METRICS, values, strict=True)
        return {name: value for name, value in named if not math.isnan(value)}


def length_statistics(pairs: PairTable) -> LengthStatistics:
    """Compute LengthStatistics over the pairs whose margin is finite."""
    finite = np.isfinite(pairs.margins)
    margins, lengths = pairs.margins[finite], pairs.lengths[finite]
    longer = lengths[:, 0] - lengths[:, 1]
    right = margins > 0
    chosen_longer, chosen_shorter = longer > 0, longer < 0
    unequal = chosen_longer | chosen_shorter
    decided = unequal & (margins != 0)
    preferred = np.where(margins > 0, lengths[:, 0], np.where(margins < 0, lengths[:, 1], lengths.mean(1)))
    spread = margins.std() * longer.std() if len(margins) > 1 else 0.0
    return LengthStatistics(
        accuracy_chosen_longer=share(right[chosen_longer]),
        accuracy_chosen_shorter=share(right[chosen_shorter]),
        chosen_longer=float(chosen_longer[unequal].mean()) if unequal.any() else math.nan,
        longer_preferred=share((margins > 0)[decided] == chosen_longer[decided]),
        margin_correlation=float(np.mean((margins - margins.mean()) * (longer - longer.mean())) / spread)
        if spread > 0
        else math.nan,
        preferred_length=float(preferred.mean()) if len(preferred) else math.nan,
    )
