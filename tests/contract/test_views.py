"""The public views: their columns, and the same values from the same data on both back ends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from harp_batch.records import Answer, FinishReason, MetricValue, TokenTrace
from harp_batch.store import RunRecord, Store, open_store, run_query
from harp_batch.store.types import Float32Array, float32
from tests.support.store_records import a_run, an_answer

# The lists of the project's design, written out once more: these names are a promise.
COLUMNS = {
    "results": """run_id run_name model task method metric filter value stderr ci_low ci_high n baseline delta
        delta_ci_low delta_ci_high p_value output_tokens tokens_per_second forward_tokens_per_token
        relative_cost relative_time hesitation_rate flip_rate""",
    "answers": """run_id model task method doc_id repeat target text correct finish_reason prompt_tokens
        output_tokens hesitations flips forward_tokens seconds error""",
    "tokens": """run_id model task method doc_id repeat step token_id entropy hesitated vanilla_token_id
        flipped""",
}
_numbers = count()


@pytest.mark.parametrize("view", COLUMNS)
def test_columns(store: Store, store_url: str, view: str) -> None:
    assert run_query(store_url, f"SELECT * FROM {view}").columns == tuple(COLUMNS[view].split())


def rows(url: str, sql: str) -> list[tuple[Any, ...]]:
    result = run_query(url, sql)
    assert not result.truncated
    return list(result.rows)


class TestOneRun:
    @pytest.fixture
    def run(self, store: Store) -> RunRecord:
        """Greedy answered two documents, harp three, one of them with an error."""
        run = a_run()
        store.create_run(run)
        greedy, harp = (e.id for e in run.evaluations)
        plain = TokenTrace((7, 8, 9), (0.5, 1.25, 3.0), (False,) * 3, (7, 8, 9), (False,) * 3)
        store.commit([an_answer(greedy, n, trace=plain, forward_tokens=6) for n in range(2)])
        store.commit([an_answer(harp, n, seconds=0.5) for n in range(2)])
        failed = an_answer(harp, 3, text=None, trace=TokenTrace(), forward_tokens=0, seconds=0.0)
        store.commit(
            [replace(failed, finish_reason=FinishReason.ERROR, error="too long", correct=None, scores={})]
        )
        return run

    def test_results(self, store: Store, run: RunRecord) -> None:
        greedy, harp = (e.id for e in run.evaluations)
        metric = MetricValue(harp, "acc", "none", 0.5, 0.1, 0.3, 0.7, 3, "greedy", 0.25, 0.0, 0.5, 0.125)
        store.save_metrics(run.id, [MetricValue(greedy, "acc", "none", 0.25, 0.1, 0, 1, 2), metric])
        base, reframed = store.results(run.id)
        assert reframed == {
            "run_id": run.id, "run_name": "nightly", "model": "tiny", "task": "sums", "method": "harp",
            "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1, "ci_low": 0.3, "ci_high": 0.7,
            "n": 3, "baseline": "greedy", "delta": 0.25, "delta_ci_low": 0.0, "delta_ci_high": 0.5,
            "p_value": 0.125, "output_tokens": 6, "tokens_per_second": pytest.approx(6 / 1.0),
            "forward_tokens_per_token": 24 / 6, "relative_cost": 2.0, "relative_time": pytest.approx(2.0),
            "hesitation_rate": pytest.approx(4 / 6), "flip_rate": pytest.approx(2 / 6),
        }  # fmt: skip
        assert (base["baseline"], base["relative_cost"], base["relative_time"]) == ("greedy", 1.0, 1.0)
        assert (base["hesitation_rate"], base["flip_rate"], base["delta"]) == (0.0, 0.0, None)

    def test_answers(self, store_url: str, run: RunRecord) -> None:
        found = rows(store_url, "SELECT * FROM answers ORDER BY method, doc_id")
        assert len(found) == 5
        assert found[2] == (
            run.id, "tiny", "sums", "harp", 0, 0, "1", "4 is the answer", True, "stop", 3, 3, 2, 1, 12, 0.5, None
        )  # fmt: skip
        assert found[4] == (
            run.id, "tiny", "sums", "harp", 3, 0, "4", None, None, "error", 3, 0, 0, 0, 0, 0.0, "too long"
        )  # fmt: skip

    def test_tokens(self, store_url: str, run: RunRecord) -> None:
        found = rows(
            store_url,
            "SELECT step, token_id, entropy, hesitated, vanilla_token_id, flipped FROM tokens "
            "WHERE method = 'harp' AND doc_id = 1 ORDER BY step",
        )
        assert found == [
            (0, 7, 0.5, False, 7, False),
            (1, 8, 1.25, True, 8, False),
            (2, 9, 3.0, True, 2, True),
        ]
        assert rows(store_url, "SELECT count(*) FROM tokens WHERE doc_id = 3") == [(0,)]


def test_speed_is_undefined_rather_than_zero(store: Store) -> None:
    run = a_run()
    store.create_run(run)
    greedy, harp = (e.id for e in run.evaluations)
    store.commit([an_answer(greedy, trace=TokenTrace(), forward_tokens=0, seconds=0.0)])
    store.save_metrics(run.id, [MetricValue(e, "acc", "none", 0.0, *[None] * 3, 1) for e in (greedy, harp)])
    speed = ("tokens_per_second", "forward_tokens_per_token", "relative_cost", "relative_time",
             "hesitation_rate", "flip_rate")  # fmt: skip
    answered, unanswered = store.results(run.id)
    assert answered["output_tokens"] == 0
    assert unanswered["output_tokens"] is None
    assert {row[name] for row in (answered, unanswered) for name in speed} == {None}


def test_an_evaluation_without_metrics_has_no_results(store: Store) -> None:
    run = a_run()
    store.create_run(run)
    store.commit([an_answer(run.evaluations[0].id)])
    assert store.results(run.id) == []


ids = st.integers(0, 2**31 - 1)
entropies = st.floats(0, 2.0**10, allow_nan=False, width=32) | st.floats(0, 20) | st.floats(0, 1e-40)
tokens = st.lists(st.tuples(ids, entropies, st.booleans(), ids, st.booleans()), max_size=6)
texts = st.text(st.characters(), max_size=20)


def trace_of(tuples: list[tuple[int, float, bool, int, bool]]) -> TokenTrace:
    return TokenTrace(*zip(*tuples, strict=True)) if tuples else TokenTrace()


@st.composite
def answers_of_one(draw: st.DrawFn) -> list[Answer]:
    """Answers of an evaluation that has no id yet."""
    places = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=4, unique=True))
    return [
        Answer(
            "",
            doc_id,
            repeat,
            draw(st.sampled_from(FinishReason)),
            draw(st.none() | texts),
            trace=draw(tokens.map(trace_of)),
            prompt_tokens=draw(st.integers(0, 9999)),
            forward_tokens=draw(st.integers(0, 10**6)),
            seconds=draw(st.just(0.0) | st.floats(1e-9, 1e6)),
            error=draw(st.none() | texts),
            scores={"acc,none": draw(st.floats(-1e300, 1e300))},
            correct=draw(st.none() | st.booleans()),
        )
        for doc_id, repeat in places
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, postgres_server: str) -> Iterator[dict[str, Store]]:
    """Two stores that get the same data."""
    urls = [
        f"sqlite:///{tmp_path_factory.mktemp('both') / 'both.db'}",
        f"{postgres_server}&options=-csearch_path%3Dpair",
    ]
    run_sql(postgres_server, "CREATE SCHEMA pair")
    opened = {url: open_store(url) for url in urls}
    yield opened
    for store in opened.values():
        store.close()


def run_sql(url: str, sql: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql)


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(greedy=answers_of_one(), harp=answers_of_one())
def test_both_back_ends_show_the_same(
    both: dict[str, Store], greedy: list[Answer], harp: list[Answer]
) -> None:
    run = a_run(id=f"both-{next(_numbers)}")
    names = [e.id for e in run.evaluations]
    answers = [replace(a, evaluation_id=names[0]) for a in greedy]
    answers += [replace(a, evaluation_id=names[1]) for a in harp]
    shown = []
    for url, store in both.items():
        store.create_run(run)
        assert store.commit(answers) == len(answers)
        store.save_metrics(run.id, [MetricValue(e, "acc", "none", 0.1, *[None] * 3, 1) for e in names])
        shown.append(everything(url, run.id) | {"read": [list(store.answers(e, traces=True)) for e in names]})
    for part in ("answers", "tokens", "sums", "results"):
        assert same(shown[0][part], shown[1][part])
    assert same(shown[0]["tokens"], expected_tokens(run, answers))
    assert shown[0]["read"] == shown[1]["read"]


def same(one: Any, other: Any) -> bool:
    """Equal, except that sums may be added in another order and SQLite may misread a decimal's last bit."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)


def everything(url: str, run_id: str) -> dict[str, list[Any]]:
    """What the views show of the run; sums, because the types of sums differ most between databases."""
    whole = {
        view: rows(url, f"SELECT * FROM {view} WHERE run_id = '{run_id}' ORDER BY {order}")
        for view, order in {
            "answers": "method, doc_id, repeat",
            "tokens": "method, doc_id, repeat, step",
        }.items()
    }
    sums = "SELECT count(*), sum(output_tokens), avg(output_tokens), max(forward_tokens) FROM answers"
    return {
        **whole,
        "sums": rows(url, f"{sums} WHERE run_id = '{run_id}'"),
        "results": rows(url, f"SELECT * FROM results WHERE run_id = '{run_id}' ORDER BY method"),
    }


def expected_tokens(run: RunRecord, answers: list[Answer]) -> list[tuple[Any, ...]]:
    method = {e.id: e.method for e in run.evaluations}
    expected = []
    for a in sorted(answers, key=lambda a: (method[a.evaluation_id], a.doc_id, a.repeat)):
        t = a.trace
        for step in range(len(t)):
            shortest = float(str(np.float32(t.entropy[step])))
            place = (run.id, "tiny", "sums", method[a.evaluation_id], a.doc_id, a.repeat, step)
            happened = (t.hesitated[step], t.vanilla_token_ids[step], t.flipped[step])
            expected.append((*place, t.token_ids[step], shortest, *happened))
    return expected


@given(st.lists(entropies))
@settings(max_examples=50)
def test_entropy_is_rounded_to_float32(values: list[float]) -> None:
    rounded = float32(values)
    assert list(rounded) == [float(np.float32(value)) for value in values]
    column = Float32Array()
    assert column.from_stored(json.loads(column.as_text(rounded))) == rounded
