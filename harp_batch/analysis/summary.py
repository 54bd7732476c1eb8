"""From every document's scores to an evaluation's metric rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from harp_batch.analysis.compare import Comparison, compare, is_binary
from harp_batch.analysis.intervals import Interval, bootstrap_mean, wilson
from harp_batch.records import Evaluation, MetricValue

AnswerKey = tuple[int, int]  # (doc_id, repeat)


@dataclass(frozen=True)
class Scored:
    """An evaluation with what the task made of its answers; metrics are named ``metric,filter``."""

    evaluation: Evaluation
    scores: Mapping[
        AnswerKey, Mapping[str, Any]
    ]  # of every answer: metric -> its value, as the task scored it
    aggregated: Mapping[
        str, tuple[float | None, float | None]
    ]  # metric -> (value, stderr) by the task's own rule

    def document_means(self, metric: str) -> dict[int, float] | None:
        """Mean over repeats for every document; ``None`` where the metric is no mean of plain numbers.

        The document is the unit of every statistic here: repeats of one document are not independent.
        """
        by_document: defaultdict[int, list[float]] = defaultdict(list)
        for (doc_id, _), value in self.values(metric).items():
            if not _is_plain(value):
                return None
            by_document[doc_id].append(float(value))
        means = {doc_id: fmean(values) for doc_id, values in by_document.items()}
        return means if self._is_their_mean(metric, by_document.values()) else None

    def values(self, metric: str) -> dict[AnswerKey, Any]:
        """The metric's value of every answer that has one."""
        return {key: scores[metric] for key, scores in self.scores.items() if metric in scores}

    def count(self, metric: str) -> int:
        """Documents that have the metric."""
        return len({doc_id for doc_id, _ in self.values(metric)})

    def _is_their_mean(self, metric: str, values: Iterable[list[float]]) -> bool:
        """Perplexity, say, has a plain number for each document too, but is no mean of them."""
        flat = [value for group in values for value in group]
        aggregate = self.aggregated[metric][0]
        return bool(flat) and aggregate is not None and math.isclose(aggregate, fmean(flat), abs_tol=1e-9)


def summarise(own: Scored, baseline: Scored | None = None, seed: int = 0) -> list[MetricValue]:
    """One row a metric, in the task's order; ``baseline`` is None for the baseline itself.

    Values and standard errors are the task's own. A standard error is undefined for fewer than two documents
    and where all documents have one value. Means of 0 and 1 get a Wilson interval, other means a bootstrap
    one, anything else none. Differences are paired by document; ``seed`` makes the resampling repeatable.
    """
    return [_row(metric, own, baseline, seed) for metric in own.aggregated]


def _row(metric: str, own: Scored, baseline: Scored | None, seed: int) -> MetricValue:
    name, _, filter_name = metric.partition(",")
    value, stderr = own.aggregated[metric]
    ci_low, ci_high = _interval(own.document_means(metric), seed) or (None, None)
    return MetricValue(
        evaluation_id=own.evaluation.id,
        metric=name,
        filter=filter_name,
        value=_finite(value),
        stderr=_finite(stderr) if _varies(metric, own) else None,
        ci_low=ci_low,
        ci_high=ci_high,
        n=own.count(metric),
        **_difference_columns(metric, own, baseline, seed),
    )


def _difference_columns(metric: str, own: Scored, baseline: Scored | None, seed: int) -> dict[str, Any]:
    if baseline is None:
        return {}
    found = _difference(metric, own, baseline, seed)
    low, high = (found and found.interval) or (None, None)
    return {
        "baseline": baseline.evaluation.method,
        "delta": found and found.delta,
        "delta_ci_low": low,
        "delta_ci_high": high,
        "p_value": found and found.p_value,
    }


def _interval(means: Mapping[int, float] | None, seed: int) -> Interval | None:
    if means is None:
        return None
    values = list(means.values())
    if is_binary(values):
        return wilson(round(sum(values)), len(values))
    return bootstrap_mean(values, seed)


def _difference(metric: str, own: Scored, baseline: Scored, seed: int) -> Comparison | None:
    if metric not in baseline.aggregated:
        return None
    ours, theirs = own.document_means(metric), baseline.document_means(metric)
    if ours is not None and theirs is not None:
        return compare(ours, theirs, seed)
    return _plain_difference(metric, own, baseline)


def _plain_difference(metric: str, own: Scored, baseline: Scored) -> Comparison | None:
    """Of two aggregates that are no means: no interval, and only over the same answers."""
    value, other = _finite(own.aggregated[metric][0]), _finite(baseline.aggregated[metric][0])
    if value is None or other is None or not _same_answers(metric, own, baseline):
        return None
    return Comparison(delta=value - other, interval=None, p_value=None, n=own.count(metric))


def _same_answers(metric: str, own: Scored, baseline: Scored) -> bool:
    """An answer with an error has no perplexity, say: to compare without it would flatter whoever failed on it."""
    return own.values(metric).keys() == baseline.values(metric).keys()


def _varies(metric: str, own: Scored) -> bool:
    """Whether there are two documents with different values, without which a standard error says nothing."""
    values = list(own.values(metric).values())
    return own.count(metric) > 1 and any(value != values[0] for value in values)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
