"""Intervals against published tables and formulas written another way."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp_batch.analysis.intervals import bootstrap_mean, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_table(successes: int, n: int, low: float, high: float):
    """R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 17 (1998)."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(2, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_are_where_the_score_test_turns(case: tuple[int, int]):
    """At either end p of the interval, the observed share is exactly 1.96 standard errors of p away."""
    successes, n = case
    interval = wilson(successes, n)
    assert interval is not None
    for p in interval:
        assert n * (successes / n - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p), abs=1e-6)
    assert -1e-12 <= interval.low <= successes / n <= interval.high <= 1 + 1e-12


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (0, 1), (1, 1)])
def test_wilson_is_undefined_below_two_documents(successes: int, n: int):
    assert wilson(successes, n) is None


@pytest.mark.parametrize("values", [[], [0.3], [0.3, 0.3, 0.3]])
def test_the_bootstrap_is_undefined_without_two_different_values(values: list[float]):
    assert bootstrap_mean(values) is None


@settings(max_examples=25)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.integers(0, 2**31 - 1))
def test_the_bootstrap_repeats_itself_and_stays_among_the_values(values: list[float], seed: int):
    interval = bootstrap_mean(values, seed)
    assert interval == bootstrap_mean(values, seed)
    if interval is not None:
        assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_the_bootstrap_agrees_with_the_normal_approximation_where_that_holds():
    values = np.random.default_rng(1).gamma(2.0, size=500).tolist()
    half_width = 1.96 * stdev(values) / math.sqrt(len(values))
    interval = bootstrap_mean(values)
    assert interval == pytest.approx(
        (fmean(values) - half_width, fmean(values) + half_width), abs=0.1 * half_width
    )


def test_the_seed_matters():
    values = [0.1, 0.7, 0.3, 0.9, 0.2, 0.55]
    assert len({bootstrap_mean(values, seed) for seed in range(10)}) > 1
