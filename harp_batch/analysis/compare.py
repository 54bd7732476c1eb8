"""Two methods on the same documents: how far apart they are, and whether chance alone would do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from harp_batch.analysis.intervals import RESAMPLES, Interval, batch_for, bootstrap_mean


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method against the baseline over the documents that both have answered."""

    delta: float  # mean of (method - baseline) over the documents
    interval: Interval | None  # 95%, of delta
    p_value: float | None  # of "the method makes no difference"
    n: int  # documents in both


def compare(values: Mapping[int, float], baseline: Mapping[int, float], seed: int = 0) -> Comparison | None:
    """Paired comparison by document id; ``None`` where no document is in both.

    The interval is a seeded bootstrap over documents, of the paired differences; the p-value is exact
    McNemar where every value is 0 or 1, else a seeded permutation test. Both are ``None`` for one document.
    """
    common = sorted(values.keys() & baseline.keys())
    if not common:
        return None
    ours, theirs = [values[doc] for doc in common], [baseline[doc] for doc in common]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Comparison(
        delta=float(np.mean(differences)),
        interval=bootstrap_mean(differences, seed),
        p_value=_p_value(ours, theirs, seed),
        n=len(common),
    )


def is_binary(values: Sequence[float]) -> bool:
    """Whether every value is 0 or 1."""
    return set(values) <= {0.0, 1.0}


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided p-value of ``fixed`` documents turned right and ``broken`` turned wrong; 1 where none turned.

    Estimator: exact McNemar test, which is a binomial test of the discordant pairs against 1/2.
    Assumption: pairs are independent.
    Citation: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12 (1947).
    """
    discordant = fixed + broken
    return float(stats.binomtest(fixed, discordant).pvalue) if discordant else 1.0


def permutation(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of the mean paired difference.

    Estimator: permutation test that swaps the two values of a document; exact for up to 12 documents,
    otherwise 5,000 random permutations from a generator seeded with ``seed``.
    Assumption: documents are independent; under the null hypothesis the two values of one are exchangeable.
    Citation: R. A. Fisher, "The Design of Experiments" (1935), section 21.
    """
    return float(
        stats.permutation_test(
            (np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)),
            _mean_difference,
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=batch_for(2 * len(ours)),
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def _mean_difference(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.asarray(np.mean(x - y, axis=axis))


def _p_value(ours: Sequence[float], theirs: Sequence[float], seed: int) -> float | None:
    if len(ours) < 2:
        return None
    if is_binary([*ours, *theirs]):
        pairs = list(zip(ours, theirs, strict=True))
        return mcnemar(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
    return permutation(ours, theirs, seed)
