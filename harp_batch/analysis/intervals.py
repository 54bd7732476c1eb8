"""Confidence intervals of one evaluation's mean. All of them are two-sided; ``None`` means undefined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 5_000
_CELLS = 4_000_000  # resampled values in memory at a time


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


def wilson(successes: int, n: int) -> Interval | None:
    """95% interval of a proportion; ``None`` for fewer than two documents.

    Estimator: Wilson's score interval, without continuity correction; defined for 0 of n and n of n too.
    Assumption: documents are independent draws with one probability of success.
    Citation: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22
    (1927).
    """
    if n < 2:
        return None
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval | None:
    """95% interval of the mean; ``None`` for fewer than two values, and where all are equal.

    Estimator: percentile bootstrap with 5,000 resamples, from a generator seeded with ``seed``.
    Assumption: values are independent draws from one distribution.
    Citation: B. Efron & R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    if len(values) < 2 or len(set(values)) == 1:
        return None
    interval = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=batch_for(len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high))


def batch_for(n: int) -> int:
    """How many resamples of ``n`` values to hold at a time."""
    return max(1, _CELLS // n)
