"""Metric rows: what is defined, what is not, and what is paired."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import pytest

from harp_batch.analysis.compare import compare
from harp_batch.analysis.intervals import wilson
from harp_batch.analysis.summary import Scored, summarise
from harp_batch.records import Evaluation, MetricValue


def evaluation(method: str) -> Evaluation:
    return Evaluation(
        id=f"id-{method}",
        run_id="run",
        model="m",
        task="t",
        method=method,
        settings={"kind": method},
        is_baseline=method == "greedy",
        requests=4,
    )


def scored(
    method: str, scores: dict[Any, dict[str, Any]], **aggregated: tuple[float | None, float | None]
) -> Scored:
    by_key = {key if isinstance(key, tuple) else (key, 0): value for key, value in scores.items()}
    return Scored(evaluation(method), by_key, {f"{name},none": pair for name, pair in aggregated.items()})


def accuracy(method: str, values: list[float]) -> Scored:
    scores = {doc: {"acc,none": value} for doc, value in enumerate(values)}
    return scored(method, scores, acc=(fmean(values), 0.1))


def only(rows: list[MetricValue]) -> MetricValue:
    (row,) = rows
    return row


def test_a_yes_or_no_metric_gets_wilson():
    row = only(summarise(accuracy("greedy", [1, 0, 1, 1])))
    assert (row.evaluation_id, row.metric, row.filter) == ("id-greedy", "acc", "none")
    assert (row.value, row.stderr, row.n) == (0.75, 0.1, 4)
    assert (row.ci_low, row.ci_high) == wilson(3, 4)
    assert (row.baseline, row.delta, row.delta_ci_low, row.delta_ci_high, row.p_value) == (None,) * 5


def test_a_mean_of_other_numbers_gets_the_bootstrap():
    row = only(summarise(accuracy("greedy", [0.1, 0.5, 0.25, 0.9])))
    assert row.ci_low is not None
    assert row.ci_high is not None
    assert 0.1 <= row.ci_low < 0.4375 < row.ci_high <= 0.9


def test_the_difference_is_paired_with_the_baseline():
    ours, theirs = [1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1]
    row = only(summarise(accuracy("harp", ours), accuracy("greedy", theirs), seed=5))
    expected = compare(dict(enumerate(ours)), dict(enumerate(theirs)), seed=5)
    assert expected is not None
    assert row.baseline == "greedy"
    assert (row.delta, row.p_value) == (expected.delta, expected.p_value)
    assert (row.delta_ci_low, row.delta_ci_high) == expected.interval


def test_all_right_has_an_interval_but_no_standard_error():
    row = only(summarise(accuracy("greedy", [1, 1, 1])))
    assert (row.value, row.stderr) == (1.0, None)
    assert (row.ci_low, row.ci_high) == wilson(3, 3)


def test_one_document_has_a_value_and_nothing_else():
    row = only(summarise(accuracy("harp", [1]), accuracy("greedy", [0])))
    assert (row.value, row.n, row.delta) == (1.0, 1, 1.0)
    assert (row.stderr, row.ci_low, row.ci_high, row.delta_ci_low, row.p_value) == (None,) * 5


def test_perplexity_is_no_mean_of_its_plain_numbers():
    def perplexity(method: str, logprobs: list[float]) -> Scored:
        scores = {doc: {"perplexity,none": value} for doc, value in enumerate(logprobs)}
        return scored(method, scores, perplexity=(math.exp(-fmean(logprobs)), 0.5))

    ours, theirs = perplexity("harp", [-1.0, -2.0]), perplexity("greedy", [-2.0, -3.0])
    row = only(summarise(ours, theirs))
    assert (row.value, row.stderr, row.n) == (math.exp(1.5), 0.5, 2)
    assert row.delta == pytest.approx(math.exp(1.5) - math.exp(2.5))
    assert (row.ci_low, row.ci_high, row.delta_ci_low, row.p_value) == (None,) * 4


def test_aggregates_over_different_answers_are_not_subtracted():
    ours = scored("harp", {0: {"ppl,none": [1, 2]}, 1: {"ppl,none": [3, 2]}}, ppl=(3.0, None))
    theirs = scored("greedy", {0: {"ppl,none": [1, 2]}}, ppl=(2.0, None))
    row = only(summarise(ours, theirs))
    assert (row.value, row.n, row.delta, row.stderr) == (3.0, 2, None, None)


def test_an_error_without_a_perplexity_leaves_the_difference_undefined():
    failed = {0: {"acc,none": 1, "ppl,none": [1, 2]}, 1: {"acc,none": 0.0}}
    whole = {0: {"acc,none": 1, "ppl,none": [1, 2]}, 1: {"acc,none": 1, "ppl,none": [9, 2]}}
    ours = scored("harp", failed, acc=(0.5, 0.5), ppl=(2.0, None))
    rows = {
        row.metric: row for row in summarise(ours, scored("greedy", whole, acc=(1.0, 0.0), ppl=(5.0, None)))
    }
    assert (rows["ppl"].value, rows["ppl"].n, rows["ppl"].delta) == (2.0, 1, None)
    assert rows["acc"].delta == -0.5


def test_documents_without_a_score_do_not_count():
    ours = scored("harp", {0: {"acc,none": 1}, 1: {}, 2: {"acc,none": 0}}, acc=(0.5, 0.5))
    row = only(summarise(ours, accuracy("greedy", [0, 1, 0])))
    assert (row.n, row.value, row.delta) == (2, 0.5, 0.5)
    assert (row.ci_low, row.ci_high) == wilson(1, 2)


def test_repeats_of_a_document_are_averaged_before_anything_else():
    answers = {(doc, repeat): {"acc,none": float(repeat <= doc)} for doc in range(3) for repeat in range(4)}
    ours = scored("nucleus", answers, acc=(fmean([0.25, 0.5, 0.75]), 0.1))
    row = only(summarise(ours, accuracy("greedy", [0, 1, 1])))
    assert (row.n, row.value) == (3, 0.5)
    assert row.delta == pytest.approx(fmean([0.25, -0.5, -0.25]))
    assert row.ci_low is not None
    assert row.ci_low >= 0.25 - 1e-9


def test_nothing_undefined_is_shown_as_a_number():
    nothing = scored("greedy", {0: {"acc,none": math.nan}, 1: {"acc,none": 1.0}}, acc=(math.nan, math.inf))
    row = only(summarise(nothing, nothing))
    assert (row.value, row.stderr, row.ci_low, row.delta, row.p_value) == (None,) * 5
    assert only(summarise(scored("greedy", {}, acc=(None, None)))).n == 0


def test_a_metric_that_the_baseline_lacks_is_not_compared():
    row = only(summarise(accuracy("harp", [1, 0]), scored("greedy", {0: {}}, f1=(0.5, None))))
    assert (row.baseline, row.delta) == ("greedy", None)


def test_rows_keep_the_tasks_order():
    both = scored("greedy", {0: {"b,none": 1, "a,none": 0}}, b=(1.0, None), a=(0.0, None))
    assert [row.metric for row in summarise(both)] == ["b", "a"]
