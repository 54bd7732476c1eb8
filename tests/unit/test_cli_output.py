"""Rows on stdout, and numbers for people."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp_batch.cli import numbers
from harp_batch.cli.output import csv_text, json_text, text_table

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts
)
tables = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(texts, min_size=n, max_size=n, unique=True),
        st.lists(st.lists(values, min_size=n, max_size=n), max_size=5),
    )
)


@given(tables)
def test_json_keeps_every_value(table: tuple[list[str], list[list[object]]]) -> None:
    columns, rows = table
    assert [list(record.items()) for record in json.loads(json_text(columns, rows))] == [
        list(zip(columns, row, strict=True)) for row in rows
    ]


def test_json_keeps_both_of_two_columns_of_one_name() -> None:
    assert json.loads(json_text(["n", "n", "n_2"], [[1, 2, 3]])) == [{"n": 1, "n_2": 2, "n_2_2": 3}]


def test_json_of_what_databases_hand_out() -> None:
    row = [
        Decimal("3"),
        Decimal("0.5"),
        float("nan"),
        datetime(2026, 1, 2, tzinfo=UTC),
        b"\x01\xff",
        [1.5, None],
    ]
    (record,) = json.loads(json_text(list("abcdef"), [row]))
    assert list(record.values()) == [3, 0.5, None, "2026-01-02T00:00:00+00:00", "01ff", [1.5, None]]


@given(st.lists(st.tuples(texts, texts), max_size=5))
def test_csv_reads_back(rows: list[tuple[str, str]]) -> None:
    text = csv_text(["a", "b"], rows)
    assert [tuple(row) for row in csv.reader(io.StringIO(text, newline=""))] == [("a", "b"), *rows]


def test_csv_of_values() -> None:
    assert csv_text(["a", "b", "c", "d"], [[None, True, 0.1, [1, 2]]]) == 'a,b,c,d\n,true,0.1,"[1, 2]"\n'


def test_table_aligns_and_marks_undefined() -> None:
    lines = text_table(["name", "n"], [["a", 1], ["bcd", 20], ["e", None]]).splitlines()
    assert [line.split() for line in lines if line.strip("─-")] == [
        ["name", "n"],
        ["a", "1"],
        ["bcd", "20"],
        ["e", "-"],
    ]
    assert (
        len({line.index(last) + len(last) for line, last in zip(lines[2:], ["1", "20", "-"], strict=True)})
        == 1
    )


@given(st.text(max_size=30))
def test_table_lets_no_control_character_through(text: str) -> None:
    shown = text_table(["text"], [[text]])
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert len(shown.splitlines()) == 3 if text.strip() else True


def test_table_shows_markup_as_it_is() -> None:
    assert "[bold]x[/bold] :smile: \\x1b[31m" in text_table(["t"], [["[bold]x[/bold] :smile: \x1b[31m"]])


def test_a_table_is_never_folded_without_a_terminal() -> None:
    assert text_table(["t"], [["word " * 100]]).splitlines()[-1] == ("word " * 100).strip()


def test_only_long_text_is_folded_and_only_to_the_terminals_width() -> None:
    row = ["a-word-of-twenty-six-chars" * 2] * 2 + ["x" * 200]
    lines = text_table(["a", "b", "c"], [row], width=200).splitlines()
    assert max(map(len, lines)) == 200
    assert lines[2].split()[:2] == row[:2]
    assert "".join(line.split()[-1] for line in lines[2:]) == row[2]
    narrow = text_table(["a", "b", "c"], [row], width=40).splitlines()
    assert narrow[2].split()[:2] == row[:2]
    assert narrow[2].split()[2] == "x" * 60


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.estimate(0.385, 0.339, 0.4334, proportion=True), "38.5% [33.9, 43.3]"),
        (numbers.estimate(12.345, None, None, proportion=False), "12.3"),
        (numbers.estimate(None, None, None, proportion=True), "-"),
        (numbers.difference(-0.14, -0.181, -0.099, proportion=True), "-14.0 [-18.1, -9.9]"),
        (numbers.difference(0.0, -0.01, 0.01, proportion=True), "0.0 [-1.0, +1.0]"),
        (numbers.difference(-0.0001, None, None, proportion=True), "0.0"),
        (numbers.difference(-0.012, -0.5, 0.0, proportion=False), "-0.012 [-0.500, 0.000]"),
        (numbers.difference(-0.0001, None, None, proportion=False), "0.000"),
        (numbers.difference(None, None, None, proportion=True), "-"),
        (numbers.percent(0.5), "50.0%"),
        (numbers.ratio(1.2345), "1.23x"),
        (numbers.ratio(None), "-"),
        (numbers.rate(1234.56), "1,234.6"),
        (numbers.p_value(0.0004), "<0.001"),
        (numbers.p_value(0.0123), "0.012"),
        (numbers.p_value(None), "-"),
        (numbers.duration(59.6), "1 min 00 s"),
        (numbers.duration(42), "42 s"),
        (numbers.duration(7620), "2 h 07 min"),
        (numbers.size(93_000_000), "93 MB"),
        (numbers.size(1_240_000_000), "1.2 GB"),
    ],
)
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("acc", 0.0, "0.0%"),
        ("acc_norm", 0.25, "25.0%"),
        ("accuracy", 0.25, "25.0%"),
        ("prompt_level_strict_acc", 0.5, "50.0%"),
        ("exact_match", 1.0, "100.0%"),
        ("em", 0.5, "50.0%"),
        ("mc2", 0.5, "50.0%"),
        ("pass@10", 0.5, "50.0%"),
        ("bleu", 0.6, "0.600"),
        ("bleu", 31.2, "31.2"),
        ("bleu_diff", 0.6, "0.600"),
        ("perplexity", 1.0, "1.000"),
        ("bits_per_byte", 0.9, "0.900"),
        ("f1", 80.0, "80.0"),
        ("brier_score", 0.2, "0.200"),
        ("acc", None, "-"),
    ],
)
def test_only_proportions_become_percentages(metric: str, value: float | None, expected: str) -> None:
    assert numbers.estimate(value, None, None, proportion=numbers.is_proportion(metric)) == expected
