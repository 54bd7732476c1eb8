"""Paired comparisons against enumeration and hand-made tables."""

from __future__ import annotations

from itertools import product
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp_batch.analysis.compare import compare, is_binary, mcnemar, permutation


@pytest.mark.parametrize(
    ("fixed", "broken", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (1, 9, 22 / 1024),
        (10, 10, 1.0),
        (9, 1, 22 / 1024),
    ],
)
def test_mcnemar_table(fixed: int, broken: int, p_value: float):
    assert mcnemar(fixed, broken) == pytest.approx(p_value, abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_doubled_binomial_tail(fixed: int, broken: int):
    n = fixed + broken
    tail = sum(comb(n, k) for k in range(min(fixed, broken) + 1))
    assert mcnemar(fixed, broken) == pytest.approx(min(1.0, 2 * tail / 2**n))


def enumerated(ours: list[float], theirs: list[float]) -> float:
    """Share of all sign patterns whose sum is at least as extreme, by the doubled smaller tail."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    observed = sum(differences)
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product([1, -1], repeat=len(differences))
    ]
    high = sum(s >= observed - 1e-9 for s in sums)
    low = sum(s <= observed + 1e-9 for s in sums)
    return min(1.0, 2 * min(high, low) / len(sums))


pairs = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=8)


@settings(max_examples=25)
@given(pairs)
def test_the_permutation_test_is_exact_on_few_documents(drawn: list[tuple[int, int]]):
    ours, theirs = [a / 4 for a, _ in drawn], [b / 4 for _, b in drawn]
    assert permutation(ours, theirs) == pytest.approx(enumerated(ours, theirs))


def test_the_permutation_test_repeats_itself_on_many_documents():
    ours = [(7 * i % 11) / 10 for i in range(60)]
    theirs = [(5 * i % 13) / 12 for i in range(60)]
    assert permutation(ours, theirs, seed=3) == permutation(ours, theirs, seed=3)
    assert permutation(ours, theirs, seed=3) == pytest.approx(permutation(ours, theirs, seed=4), abs=0.03)


def test_binary_values_get_mcnemar():
    ours = dict.fromkeys(range(10), 1.0) | {10: 0.0, 11: 1.0}
    theirs = {doc: float(doc in (0, 10, 11)) for doc in range(12)}
    found = compare(ours, theirs)
    assert found is not None
    assert found.n == 12
    assert found.delta == pytest.approx(8 / 12)
    assert found.p_value == pytest.approx(22 / 1024)  # nine fixed, one broken
    assert found.interval is not None
    assert found.interval.low <= found.delta <= found.interval.high


def test_only_documents_in_both_count():
    found = compare({1: 0.5, 2: 0.75, 9: 100.0}, {1: 0.25, 2: 0.25, 7: -100.0})
    assert found is not None
    assert (found.n, found.delta) == (2, 0.375)


def test_no_common_document_is_no_comparison():
    assert compare({1: 1.0}, {2: 1.0}) is None


def test_one_document_proves_nothing():
    found = compare({1: 1.0}, {1: 0.0})
    assert found is not None
    assert (found.delta, found.interval, found.p_value) == (1.0, None, None)


def test_equal_answers_differ_by_nothing_and_have_no_interval():
    values = {0: 1.0, 1: 0.0, 2: 1.0}
    found = compare(values, values)
    assert found is not None
    assert (found.delta, found.interval, found.p_value) == (0.0, None, 1.0)


@settings(max_examples=20)
@given(pairs, st.booleans())
def test_turning_the_comparison_round_turns_the_sign_only(drawn: list[tuple[int, int]], binary: bool):
    base = 2 if binary else 21
    ours = {doc: float(a % base) for doc, (a, _) in enumerate(drawn)}
    theirs = {doc: float(b % base) for doc, (_, b) in enumerate(drawn)}
    there, back = compare(ours, theirs), compare(theirs, ours)
    assert there is not None
    assert back is not None
    assert there.delta == pytest.approx(-back.delta)
    assert there.p_value == pytest.approx(back.p_value)


@pytest.mark.parametrize(("values", "answer"), [([0, 1.0, True], True), ([0, 0.5], False), ([-1, 1], False)])
def test_is_binary(values: list[float], answer: bool):
    assert is_binary(values) is answer
