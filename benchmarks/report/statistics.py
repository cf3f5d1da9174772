"""Means over questions and bootstrap intervals over pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Resamples pages with replacement, as questions about one page are not independent.

    The same resamples serve every value, so that differences of methods are paired.

    Args:
        pages: the page of each question.
        seed: of the resamples.
    """

    def __init__(self, pages: Sequence[str], seed: int = 0, resamples: int = RESAMPLES):
        names, self.page = np.unique(np.asarray(pages), return_inverse=True)
        generator = np.random.default_rng(seed)
        drawn = generator.integers(len(names), size=(resamples, len(names)))
        self.times = np.stack([np.bincount(row, minlength=len(names)) for row in drawn])

    def estimate(self, values: Sequence[float]) -> Estimate:
        """Mean of one value a question, with a percentile interval."""
        return self.estimate_where(values, np.ones(len(self.page), dtype=bool))

    def estimate_where(self, values: Sequence[float], chosen: np.ndarray) -> Estimate:
        """The same over chosen questions only, `(questions,)` bool; resamples without any count
        for nothing."""
        values = np.asarray(values, dtype=np.float64)[chosen]
        pages, count = self.page[chosen], self.times.shape[1]
        asked = self.times @ np.bincount(pages, minlength=count)
        sums = self.times @ np.bincount(pages, weights=values, minlength=count)
        means = sums[asked > 0] / asked[asked > 0]
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(values.mean()), float(low), float(high))
