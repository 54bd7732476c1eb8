"""What every store must do, whichever database is behind it."""

from __future__ import annotations

import math
import struct
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from random import Random

import pytest
import sqlalchemy as sa

from harp_batch.errors import RunNotFound
from harp_batch.records import Answer, FinishReason, MetricValue, TokenTrace
from harp_batch.store import RunRecord, Store, TaskRecord, open_store
from harp_batch.store.canonical import canonical_lines
from tests.support.store_records import a_choice_request, a_request, a_run, an_answer


@pytest.fixture
def run(store: Store) -> RunRecord:
    """A run in the store, without answers."""
    created = a_run()
    store.create_run(created)
    return created


@pytest.fixture
def greedy(run: RunRecord) -> str:
    """The id of the run's first evaluation."""
    return run.evaluations[0].id


class TestRuns:
    def test_a_run_is_loaded_as_it_was_created(self, store: Store) -> None:
        hour_east = datetime(2026, 3, 1, 0, 30, 0, 123456, tzinfo=timezone(timedelta(hours=1)))
        run = a_run(tuple(map(a_choice_request, (3, 1, 2))), created_at=hour_east)
        store.create_run(run)
        assert store.load_run(run.id) == run
        assert store.load_run(run.id).created_at.utcoffset() == timedelta(0)

    def test_requests_keep_their_order_and_hash(self, store: Store) -> None:
        run = a_run((a_request(2), a_request(0, repeat=1), a_request(0)))
        store.create_run(run)
        (task,) = store.load_run(run.id).tasks
        assert task.requests == run.tasks[0].requests
        assert task.requests_sha256 == run.tasks[0].requests_sha256

    def test_a_run_that_does_not_fit_is_not_half_made(self, store: Store) -> None:
        run = a_run()
        stranger = replace(run.evaluations[1], task="unknown")
        with pytest.raises(ValueError, match="does not have"):
            store.create_run(replace(run, evaluations=(run.evaluations[0], stranger)))
        assert store.runs() == []
        store.create_run(run)
        assert store.load_run(run.id) == run

    def test_documents_with_nan_are_refused(self, store: Store) -> None:
        with pytest.raises(ValueError, match=r"request sums/5/0 is not JSON"):
            store.create_run(a_run((a_request(5, doc={"x": math.nan}),)))
        assert store.runs() == []

    def test_an_id_is_used_once(self, store: Store, run: RunRecord) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            store.create_run(run)

    def test_there_is_one_baseline(self, store: Store) -> None:
        run = a_run()
        both = tuple(replace(e, is_baseline=True) for e in run.evaluations)
        with pytest.raises(ValueError, match="does not fit"):
            store.create_run(replace(run, evaluations=both))

    def test_times_without_zone_are_refused(self, store: Store) -> None:
        with pytest.raises((ValueError, sa.exc.StatementError), match="time zone"):
            store.create_run(a_run(created_at=datetime(2026, 1, 1)))

    def test_summary_counts(self, store: Store, run: RunRecord, greedy: str) -> None:
        failed = an_answer(greedy, 1, text=None, finish_reason=FinishReason.ERROR, error="too long")
        store.commit([an_answer(greedy), failed])
        summary = store.find_run(run.id)
        assert (summary.evaluations, summary.requests, summary.answered, summary.errors) == (2, 8, 2, 1)

    def test_summary_of_a_run_without_evaluations(self, store: Store) -> None:
        store.create_run(a_run(id="bare", evaluations=()))
        assert (store.find_run("bare").evaluations, store.find_run("bare").requests) == (0, 0)

    def test_the_newest_runs_come_first(self, store: Store) -> None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        for day in (1, 3, 2):
            store.create_run(a_run(id=f"day-{day}", created_at=start + timedelta(days=day)))
        assert [run.id for run in store.runs()] == ["day-3", "day-2", "day-1"]
        assert [run.id for run in store.runs(limit=1)] == ["day-3"]


class TestFindRun:
    @pytest.fixture(autouse=True)
    def three_runs(self, store: Store) -> None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        names = {"abc1": "gsm8k", "abd2": "gsm8k", "xyz%": "abc"}
        for day, (run_id, name) in enumerate(names.items()):
            store.create_run(a_run(id=run_id, name=name, created_at=start + timedelta(days=day)))

    @pytest.mark.parametrize(
        ("ref", "expected"),
        [
            ("abc1", "abc1"),
            ("abd", "abd2"),
            ("gsm8k", "abd2"),  # the newest of that name
            ("abc", "xyz%"),  # a name wins over the beginning of an id
            ("latest", "xyz%"),
            ("xyz%", "xyz%"),
        ],
    )
    def test_found(self, store: Store, ref: str, expected: str) -> None:
        assert store.find_run(ref).id == expected

    def test_several_begin_so(self, store: Store) -> None:
        with pytest.raises(RunNotFound, match=r"more than one run begins with 'ab': abd2, abc1;"):
            store.find_run("ab")

    @pytest.mark.parametrize("ref", ["", "%", "a%", "_bc1", "ABC1", "nope"])
    def test_none(self, store: Store, ref: str) -> None:
        with pytest.raises(RunNotFound, match=r"the newest are abc \(xyz%\), gsm8k \(abd2\)"):
            store.find_run(ref)

    def test_load_run_takes_ids_only(self, store: Store) -> None:
        with pytest.raises(RunNotFound, match="no run has the id 'gsm8k'"):
            store.load_run("gsm8k")


def test_latest_of_an_empty_store(store: Store) -> None:
    with pytest.raises(RunNotFound, match="there are no runs yet"):
        store.find_run("latest")


class TestAnswers:
    def test_answers_are_read_as_they_were_committed(self, store: Store, greedy: str) -> None:
        committed = [
            an_answer(greedy, 0),
            an_answer(greedy, 0, repeat=1, text="", correct=None, scores={}),
            an_answer(greedy, 1, text=None, choices=((-1.5, True), (-20.25, False)), correct=False),
            an_answer(greedy, 2, finish_reason=FinishReason.ERROR, error="too long", trace=TokenTrace()),
        ]
        assert store.commit(committed[::-1]) == 4
        assert list(store.answers(greedy, traces=True)) == committed

    def test_traces_are_left_out_unless_asked_for(self, store: Store, greedy: str) -> None:
        answer = an_answer(greedy)
        store.commit([answer])
        assert list(store.answers(greedy)) == [replace(answer, trace=TokenTrace())]

    def test_an_answer_is_never_doubled_and_never_changed(self, store: Store, greedy: str) -> None:
        first, other = an_answer(greedy, text="first"), an_answer(greedy, text="other")
        assert store.commit([first]) == 1
        assert store.commit([other]) == 0
        assert store.commit([other, an_answer(greedy, 1), other, an_answer(greedy, 2)]) == 2
        assert store.commit([an_answer(greedy, 3, text="first"), an_answer(greedy, 3, text="other")]) == 1
        assert [(a.doc_id, a.text) for a in store.answers(greedy)] == [
            (0, "first"),
            (1, "4 is the answer"),
            (2, "4 is the answer"),
            (3, "first"),
        ]

    def test_answered(self, store: Store, run: RunRecord, greedy: str) -> None:
        store.commit([an_answer(greedy, 3, repeat=2), an_answer(greedy, 1)])
        assert store.answered(greedy) == {(3, 2), (1, 0)}
        assert store.answered(run.evaluations[1].id) == set()

    def test_nothing_is_committed_as_nothing(self, store: Store) -> None:
        assert store.commit([]) == 0

    @pytest.mark.parametrize(
        ("name", "bad"),
        [
            ("entropy", {"trace": TokenTrace((1,), (math.nan,), (False,), (1,), (False,))}),
            (
                "entropy",
                {"trace": TokenTrace((1,), (1e39,), (False,), (1,), (False,))},
            ),  # infinite as float32
            ("choices", {"choices": ((-math.inf, False),)}),
            ("scores", {"scores": {"perplexity,none": [1.0, math.inf]}}),
            ("seconds", {"seconds": math.nan}),
            ("trace", {"trace": TokenTrace((1,), (0.5,), (False,), (1,), ())}),
        ],
    )
    def test_one_bad_answer_stops_its_batch(self, store: Store, greedy: str, name: str, bad: dict) -> None:
        with pytest.raises(ValueError, match=rf"answer {greedy}/1/0: .*{name}"):
            store.commit([an_answer(greedy, 0), an_answer(greedy, 1, **bad)])
        assert store.answered(greedy) == set()

    def test_an_answer_to_no_evaluation_stops_its_batch(self, store: Store, greedy: str) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            store.commit([an_answer(greedy), an_answer("nobody's", 1)])
        assert store.answered(greedy) == set()

    def test_answers_can_be_committed_while_others_are_read(self, store: Store, greedy: str) -> None:
        store.commit([an_answer(greedy, doc_id) for doc_id in range(3)])
        for answer in store.answers(greedy):
            store.commit([an_answer(greedy, answer.doc_id + 10)])
        assert len(store.answered(greedy)) == 6

    def test_a_reader_sees_what_is_committed_and_cannot_write(
        self, store: Store, greedy: str, store_url: str
    ) -> None:
        store.commit([an_answer(greedy)])
        with open_store(store_url, create=False, read_only=True) as reader:
            assert reader.answered(greedy) == {(0, 0)}
            store.commit([an_answer(greedy, 1)])
            assert len(reader.answered(greedy)) == 2
            with pytest.raises(Exception, match=r"read-?only"):
                reader.commit([an_answer(greedy, 2)])
        assert len(store.answered(greedy)) == 2


class TestRunAnswers:
    def test_they_come_in_one_order_whatever_was_committed_when(self, store: Store) -> None:
        """By code point: capitals before small letters, and an accent behind both; documents by number."""
        run = _a_run_of_every_order()
        store.create_run(run)
        for e in run.evaluations:
            store.commit([an_answer(e.id, doc_id, repeat) for doc_id in (10, 9, 100) for repeat in (1, 0)])
        found = [(e.model, e.task, e.method, a.doc_id, a.repeat) for _, e, a in store.run_answers(run.id)]
        assert len(found) == len(run.evaluations) * 6
        assert found == sorted(found)

    def test_each_has_its_model_its_evaluation_and_its_trace(self, store: Store, run: RunRecord) -> None:
        other = a_run()
        store.create_run(other)
        store.commit([an_answer(e.id) for e in (*other.evaluations, *run.evaluations)])
        assert list(store.run_answers(run.id)) == [
            (run.models[0], evaluation, an_answer(evaluation.id)) for evaluation in run.evaluations
        ]

    def test_memory_does_not_grow_with_their_number(
        self, store: Store, greedy: str, run: RunRecord, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("harp_batch.store.store._CHUNK", 10)
        peaks = []
        for count in (20, 200):
            store.commit([an_answer(greedy, doc_id, text="x" * 10_000) for doc_id in range(count)])
            tracemalloc.start()
            assert sum(1 for _ in store.run_answers(run.id)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 2 * peaks[0]


class TestCanonicalForm:
    def test_every_byte_of_it(self, store: Store, run: RunRecord, greedy: str) -> None:
        """The form is public: other bytes for the same answers are another version of it."""
        choices = ((-0.1, True), (-1.7976931348623157e308, False))
        trace = TokenTrace((7, 8), (0.1, 16.5), (False, True), (7, 2), (False, True))
        failed = {"text": None, "finish_reason": FinishReason.ERROR, "error": "too \x1b \u2028 long \x00"}
        store.commit(
            [
                an_answer(greedy, 10, text='"4"\n\U0001f600', trace=trace, scores={"b": [1, 1.0], "a": None}),
                an_answer(greedy, 9, choices=choices, correct=None, trace=TokenTrace(), **failed),
            ]
        )
        head, tail = f'"ref":"tiny","weights_sha256":"{"ab" * 32}"', '"scores":{"exact_match,strict":1.0}'
        assert b"".join(canonical_lines(store, run.id)).decode() == (
            '{"format":"harp-batch canonical export","version":1}\n'
            '{"choices":[{"is_greedy":true,"logprob":-0.1},{"is_greedy":false,"logprob":-1.7976931348623157e+308}],'
            '"correct":null,"doc_id":9,"error":"too \\u001b \u2028 long \ufffd","finish_reason":"error",'
            '"forward_tokens":12,"method":{"name":"greedy","settings":{"kind":"greedy"}},'
            f'"model":{{"dtype":"float32",{head}}},"prompt_tokens":3,"repeat":0,{tail},"task":"sums","text":null,'
            '"trace":{"entropy":[],"flipped":[],"hesitated":[],"token_ids":[],"vanilla_token_ids":[]}}\n'
            '{"choices":[],"correct":true,"doc_id":10,"error":null,"finish_reason":"stop",'
            '"forward_tokens":12,"method":{"name":"greedy","settings":{"kind":"greedy"}},'
            f'"model":{{"dtype":"float32",{head}}},"prompt_tokens":3,"repeat":0,"scores":{{"a":null,"b":[1,1.0]}},'
            '"task":"sums","text":"\\"4\\"\\n\U0001f600","trace":{"entropy":[0.10000000149011612,16.5],'
            '"flipped":[false,true],"hesitated":[false,true],"token_ids":[7,8],"vanilla_token_ids":[7,2]}}\n'
        )

    def test_both_databases_give_the_same_bytes(self, sqlite_url: str, postgres_url: str) -> None:
        run = _a_run_of_every_order()
        random = Random(0)
        answers = [_random_answer(random, e.id, doc_id) for e in run.evaluations for doc_id in range(20)]
        exports = []
        for url in (sqlite_url, postgres_url):
            with open_store(url) as opened:
                opened.create_run(run)
                opened.commit(random.sample(answers, len(answers)))
                exports.append(b"".join(canonical_lines(opened, run.id)))
        assert exports[0] == exports[1]
        assert exports[0].count(b"\n") == 1 + len(answers)


def _a_run_of_every_order() -> RunRecord:
    """Two models, two tasks and four methods, in no order, with names that locales sort in different ways."""
    run = a_run()
    (model,), (task,) = run.models, run.tasks
    tasks = [replace(task, model=ref, task=name) for ref in ("b", "A") for name in ("t_2", "t-10")]
    evaluations = [
        replace(run.evaluations[1], id=f"{place}-{method}", model=t.model, task=t.task, method=method)
        for place, t in enumerate(tasks)
        for method in ("harp", "Harp", "h\u00e4rp", "harp-1")
    ]
    models = (replace(model, ref="b"), replace(model, ref="A"))
    return replace(run, models=models, tasks=tuple(tasks), evaluations=tuple(evaluations))


def _random_answer(random: Random, evaluation_id: str, doc_id: int) -> Answer:
    """Floats of any size, from the smallest there are; text of any characters."""
    size = random.randrange(6)

    def number(form: str) -> float:
        value = struct.unpack(f"<{form}", random.randbytes(struct.calcsize(form)))[0]
        return value if math.isfinite(value) else 0.0

    def tokens() -> tuple[int, ...]:
        return tuple(random.randrange(2**31) for _ in range(size))

    def flags() -> tuple[bool, ...]:
        return tuple(random.random() < 0.5 for _ in range(size))

    entropy = tuple(abs(number("f")) for _ in range(size))
    return an_answer(
        evaluation_id,
        doc_id,
        text="".join(chr(random.randrange(0x3000)) for _ in range(9)),
        trace=TokenTrace(tokens(), entropy, flags(), tokens(), flags()),
        choices=tuple((number("d"), flag) for flag in flags()),
        scores={f"m{n}": [number("d"), n] for n in range(size)},
    )


class TestHostileText:
    HOSTILE = "a\x00b \ud800 \U0001f600 \u202e '; DROP TABLE runs; -- %s {x} \\ \" \r\n"
    STORED = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")

    def test_in_an_answer(self, store: Store, greedy: str) -> None:
        scores = {f"m{self.HOSTILE}": [self.HOSTILE, {"k": self.HOSTILE}]}
        store.commit([an_answer(greedy, text=self.HOSTILE, error=self.HOSTILE, scores=scores)])
        (read,) = store.answers(greedy)
        assert (read.text, read.error) == (self.STORED, self.STORED)
        assert read.scores == {f"m{self.STORED}": [self.STORED, {"k": self.STORED}]}

    def test_in_a_request(self, store: Store) -> None:
        printable = self.HOSTILE.replace("\ud800", "")  # no tokenizer takes a lone surrogate
        request = a_request(prompt=printable, target=self.HOSTILE, doc={"q": self.HOSTILE}, stop=(printable,))
        run = a_run((request,), name=f"n{self.HOSTILE}")
        store.create_run(run)
        read = store.load_run(run.id).tasks[0].requests[0]
        assert read.prompt == printable.replace("\x00", "\ufffd")
        assert (read.target, read.doc) == (self.STORED, {"q": self.STORED})
        assert read.prompt_ids == request.prompt_ids


class TestMetrics:
    def test_metrics_are_replaced(self, store: Store, run: RunRecord, greedy: str) -> None:
        other = a_run()
        store.create_run(other)
        store.save_metrics(other.id, [_metric(other.evaluations[0].id, 0.75)])
        store.save_metrics(run.id, [_metric(greedy, 0.25), _metric(run.evaluations[1].id, 0.5)])
        store.save_metrics(run.id, [_metric(greedy, None)])
        assert [(r["method"], r["value"]) for r in store.results(run.id)] == [("greedy", None)]
        assert [r["value"] for r in store.results(other.id)] == [0.75]
        store.save_metrics(run.id, [])
        assert store.results(run.id) == []

    def test_results_come_in_the_order_of_the_job(self, store: Store) -> None:
        run = a_run()
        run = replace(run, evaluations=run.evaluations[::-1])
        store.create_run(run)
        metrics = [_metric(e.id, 1.0, name) for name in ("b", "a") for e in run.evaluations]
        store.save_metrics(run.id, metrics)
        found = [(r["method"], r["metric"]) for r in store.results(run.id)]
        assert found == [("harp", "a"), ("harp", "b"), ("greedy", "a"), ("greedy", "b")]


def _metric(evaluation_id: str, value: float | None, name: str = "acc") -> MetricValue:
    return MetricValue(evaluation_id, name, "none", value, None, None, None, 4)


def test_equal_hashes_mean_that_the_same_was_asked() -> None:
    def digest(**changes: object) -> str:
        return TaskRecord("m", "t", "1", 0, (a_request(0), a_request(1, **changes))).requests_sha256

    asked = [{}, {"prompt": "x"}, {"prompt_ids": (1,)}, {"stop": ()}, {"max_new_tokens": 9}, {"repeat": 1}]
    assert len({digest(**changes) for changes in asked}) == len(asked)
    assert digest(target="y", doc={}) == digest()
