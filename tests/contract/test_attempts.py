"""Who drives a run: one at a time, on every database; and who does not, changes nothing."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier

import psycopg
import pytest

from harp_batch.errors import LeaseLost, RunBusy, RunNotFound, UserError
from harp_batch.records import RunStatus
from harp_batch.store import Attempt, RunRecord, Store, open_store
from tests.support.store_records import a_run, an_answer

LEASE = 60.0  # seconds; longer than a test
ROUNDS = 50


@pytest.fixture
def run(store: Store) -> RunRecord:
    created = a_run()
    store.create_run(created)
    return created


def acquire(store: Store, run: RunRecord, pid: int = 1, **changes: float | int) -> Attempt:
    return store.acquire(run.id, "here", pid, **{"stale_after": LEASE, **changes})


def assert_fenced(store: Store, attempt: Attempt, run: RunRecord) -> None:
    """Nothing that the attempt does has an effect."""
    before = store.attempts(run.id), store.find_run(run.id)
    evaluation = run.evaluations[0].id
    answered = store.answered(evaluation)
    for act in (
        lambda: store.commit([an_answer(evaluation, 1001)], attempt),
        lambda: store.heartbeat(attempt, {"late": True}, 9.0),
        lambda: store.end_attempt(attempt, RunStatus.FAILED, "late"),
    ):
        with pytest.raises(LeaseLost, match=rf"run {run.id[:8]} was .*: this driver stops"):
            act()
    assert (store.attempts(run.id), store.find_run(run.id)) == before
    assert store.answered(evaluation) == answered


class TestAcquire:
    def test_the_first(self, store: Store, run: RunRecord) -> None:
        attempt = acquire(store, run, pid=4711)
        assert (attempt.run_id, attempt.epoch, attempt.host, attempt.pid) == (run.id, 1, "here", 4711)
        assert (attempt.ended_at, attempt.outcome, attempt.seconds, attempt.state) == (None, None, 0.0, {})
        assert attempt.started_at == attempt.heartbeat_at
        assert abs(attempt.started_at - datetime.now(UTC)) < timedelta(minutes=1)
        assert store.attempts(run.id) == [attempt]

    def test_while_it_lasts_nobody_else_may(self, store: Store, run: RunRecord) -> None:
        attempt = acquire(store, run, pid=4711)
        sentence = (
            rf"^run nightly \({run.id[:8]}\) is being driven by here \(process 4711\), heard from \d+ s ago; "
            rf"stop it there with Ctrl-C, or with `harp-batch cancel {run.id[:8]}`$"
        )
        with pytest.raises(RunBusy, match=sentence) as caught:
            acquire(store, run)
        assert caught.value.attempt == attempt
        assert caught.value.exit_code == 2
        assert store.attempts(run.id) == [attempt]

    def test_after_its_end_the_next_may(self, store: Store, run: RunRecord) -> None:
        store.end_attempt(acquire(store, run), RunStatus.FAILED, "no memory")
        second = acquire(store, run)
        assert second.epoch == 2
        now = store.find_run(run.id)
        assert (now.status, now.error, now.finished_at) == (RunStatus.RUNNING, None, None)

    def test_one_that_is_not_heard_from_is_replaced(self, store: Store, run: RunRecord) -> None:
        lost = acquire(store, run)
        store.heartbeat(lost, {"phase": "decoding"}, 3.5)
        (heard,) = store.attempts(run.id)
        time.sleep(0.25)
        with pytest.raises(RunBusy):
            acquire(store, run, stale_after=20.0)
        second = acquire(store, run, stale_after=0.2)
        first, newest = store.attempts(run.id)
        assert newest == second
        assert (first.outcome, first.ended_at) == (RunStatus.INTERRUPTED, heard.heartbeat_at)
        assert (first.seconds, first.state) == (3.5, {"phase": "decoding"})
        assert_fenced(store, lost, run)

    def test_a_heartbeat_keeps_it(self, store: Store, run: RunRecord) -> None:
        attempt = acquire(store, run)
        time.sleep(0.25)
        store.heartbeat(attempt, {}, 0.0)
        with pytest.raises(RunBusy):
            acquire(store, run, stale_after=0.2)

    def test_one_known_to_be_dead_is_replaced_at_once(self, store: Store, run: RunRecord) -> None:
        dead = acquire(store, run)
        assert acquire(store, run, taking_over=dead.epoch).epoch == 2
        assert_fenced(store, dead, run)

    def test_knowing_that_an_older_one_is_dead_is_not_enough(self, store: Store, run: RunRecord) -> None:
        """Two found the first one dead; the slower of them must not end the faster one."""
        dead = acquire(store, run)
        second = acquire(store, run, pid=2, taking_over=dead.epoch)
        with pytest.raises(RunBusy) as caught:
            acquire(store, run, pid=3, taking_over=dead.epoch)
        assert caught.value.attempt == second

    def test_other_runs_are_others(self, store: Store, run: RunRecord) -> None:
        other = a_run()
        store.create_run(other)
        acquire(store, run)
        assert acquire(store, other).epoch == 1

    def test_a_cancelled_run_stays_so(self, store: Store, run: RunRecord) -> None:
        store.end_attempt(acquire(store, run), RunStatus.CANCELLED)
        with pytest.raises(UserError, match=r"was cancelled, .*: submit the job anew"):
            acquire(store, run)
        assert store.find_run(run.id).status is RunStatus.CANCELLED

    def test_no_run(self, store: Store) -> None:
        with pytest.raises(RunNotFound, match="'nope'"):
            store.acquire("nope", "here", 1, stale_after=LEASE)
        assert store.attempts("nope") == []

    def test_of_several_at_once_one_wins(self, store_url: str, store: Store, run: RunRecord) -> None:
        """Every round some free, stale or dead attempt is there for two; one gets it, and the epochs have no gap."""
        with open_store(store_url) as other, ThreadPoolExecutor(2) as pool:
            barrier = Barrier(2)
            for round_ in range(ROUNDS):
                holder = store.attempts(run.id)[-1:]
                if holder and round_ % 2:
                    store.end_attempt(holder[0], RunStatus.INTERRUPTED)
                taking_over = holder[0].epoch if holder else None

                def race(contender: tuple[int, Store], over: int | None = taking_over) -> Attempt | RunBusy:
                    barrier.wait()
                    try:
                        return acquire(contender[1], run, contender[0], taking_over=over)
                    except RunBusy as busy:
                        return busy

                outcomes = list(pool.map(race, enumerate((store, other))))
                (won,) = (outcome for outcome in outcomes if isinstance(outcome, Attempt))
                (lost,) = (outcome for outcome in outcomes if isinstance(outcome, RunBusy))
                assert lost.attempt == won
                assert won.epoch == round_ + 1
        assert [a.epoch for a in store.attempts(run.id)] == list(range(1, ROUNDS + 1))
        assert [a.ended_at is None for a in store.attempts(run.id)] == [False] * (ROUNDS - 1) + [True]


class TestHeartbeat:
    def test_it_is_what_others_read(self, store: Store, store_url: str, run: RunRecord) -> None:
        attempt = acquire(store, run)
        state = {
            "phase": "decoding",
            "rate": 12.5,
            "notes": ["a\x00b", None],
            "actors": [{"name": "actor-0"}],
        }
        assert store.heartbeat(attempt, state, 7.25) is False
        with open_store(store_url, create=False, read_only=True) as reader:
            (read,) = reader.attempts(run.id)
        assert read.state == {**state, "notes": ["a\ufffdb", None]}
        assert read.seconds == 7.25
        assert read.started_at == attempt.started_at < read.heartbeat_at

    def test_what_is_not_json_is_refused(self, store: Store, run: RunRecord) -> None:
        attempt = acquire(store, run)
        with pytest.raises(ValueError, match="the state of the attempt is not JSON"):
            store.heartbeat(attempt, {"rate": math.nan}, 0.0)
        assert store.attempts(run.id) == [attempt]


class TestCommit:
    def test_with_an_attempt_that_lasts(self, store: Store, run: RunRecord) -> None:
        attempt, evaluation = acquire(store, run), run.evaluations[0].id
        assert store.commit([an_answer(evaluation, n) for n in range(3)], attempt) == 3
        assert store.commit([an_answer(evaluation, n) for n in range(4)], attempt) == 1
        assert store.answered(evaluation) == {(n, 0) for n in range(4)}

    def test_after_the_end_nothing_is_committed(self, store: Store, run: RunRecord) -> None:
        attempt = acquire(store, run)
        store.end_attempt(attempt, RunStatus.INTERRUPTED)
        with pytest.raises(LeaseLost, match="was ended by another process"):
            store.commit([an_answer(run.evaluations[0].id)], attempt)
        assert store.answered(run.evaluations[0].id) == set()

    def test_a_zombie_and_its_successor_at_work(self, store_url: str, store: Store, run: RunRecord) -> None:
        """Whatever the first commits while it is replaced is there before the second begins, or never."""
        evaluation = run.evaluations[0].id
        first = acquire(store, run)

        def zombie() -> int:
            with open_store(store_url) as mine:
                for doc_id in range(10_000):
                    try:
                        mine.commit([an_answer(evaluation, doc_id)], first)
                    except LeaseLost:
                        return doc_id
            raise AssertionError("it was never stopped")

        with ThreadPoolExecutor(1) as pool:
            committing = pool.submit(zombie)
            while len(store.answered(evaluation)) < 5:
                time.sleep(0.001)
            acquire(store, run, taking_over=first.epoch)
            seen = store.answered(evaluation)
            assert len(seen) == committing.result()
        assert store.answered(evaluation) == seen


class TestEnd:
    def test_the_run_ends_with_it(self, store: Store, run: RunRecord) -> None:
        attempt = acquire(store, run)
        store.end_attempt(attempt, RunStatus.FAILED, error="no memory\x00")
        (ended,) = store.attempts(run.id)
        assert (ended.outcome, ended.ended_at) == (RunStatus.FAILED, ended.heartbeat_at)
        now = store.find_run(run.id)
        assert (now.status, now.error) == (RunStatus.FAILED, "no memory\ufffd")
        assert now.finished_at is not None
        assert abs(now.finished_at - datetime.now(UTC)) < timedelta(minutes=1)

    def test_once_more_does_no_harm(self, store: Store, run: RunRecord) -> None:
        """Its commit may land while the connection breaks."""
        attempt = acquire(store, run)
        store.end_attempt(attempt, RunStatus.DONE)
        before = store.attempts(run.id), store.find_run(run.id)
        store.end_attempt(attempt, RunStatus.DONE)
        assert (store.attempts(run.id), store.find_run(run.id)) == before
        with pytest.raises(LeaseLost):
            store.end_attempt(attempt, RunStatus.FAILED)


class TestCancel:
    def test_the_driver_hears_of_it(self, store: Store, store_url: str, run: RunRecord) -> None:
        attempt = acquire(store, run)
        with open_store(store_url, create=False, read_only=store_url.startswith("sqlite")) as other:
            other.request_cancel(run.id)
            other.request_cancel(run.id)
        assert store.heartbeat(attempt, {}, 0.0)
        assert store.heartbeat(attempt, {}, 0.0)  # it may not have been listening
        store.end_attempt(attempt, RunStatus.CANCELLED)
        assert store.find_run(run.id).status is RunStatus.CANCELLED

    def test_it_means_this_run_alone(self, store: Store, run: RunRecord) -> None:
        other = a_run()
        store.create_run(other)
        attempts = [acquire(store, run), acquire(store, other)]
        store.request_cancel(run.id)
        assert [store.heartbeat(attempt, {}, 0.0) for attempt in attempts] == [True, False]

    def test_it_outlives_a_driver_that_did_not_hear_it(self, store: Store, run: RunRecord) -> None:
        acquire(store, run)
        store.request_cancel(run.id)
        second = acquire(store, run, taking_over=1)
        assert store.heartbeat(second, {}, 0.0)

    def test_it_does_not_outlive_the_end(self, store: Store, run: RunRecord) -> None:
        first = acquire(store, run)
        store.request_cancel(run.id)
        store.end_attempt(first, RunStatus.INTERRUPTED)
        assert not store.heartbeat(acquire(store, run), {}, 0.0)

    def test_nobody_is_asked(self, store: Store, run: RunRecord) -> None:
        store.request_cancel(run.id)
        first = acquire(store, run)
        assert not store.heartbeat(first, {}, 0.0)
        store.end_attempt(first, RunStatus.INTERRUPTED)
        store.request_cancel(run.id)
        assert not store.heartbeat(acquire(store, run), {}, 0.0)


def test_a_takeover_waits_for_a_commit_that_has_begun(postgres_url: str) -> None:
    """In PostgreSQL; SQLite has one writer at a time. What the commit waits for here is a lock of somebody else."""
    run = a_run()
    with open_store(postgres_url) as store, open_store(postgres_url) as other, ThreadPoolExecutor(2) as pool:
        store.create_run(run)
        first = acquire(store, run)
        with psycopg.connect(postgres_url) as obstacle:
            obstacle.execute("SELECT id FROM evaluations FOR UPDATE")
            committing = pool.submit(store.commit, [an_answer(run.evaluations[0].id)], first)
            wait_for_locks(postgres_url, 1)
            taking = pool.submit(acquire, other, run, taking_over=1)
            wait_for_locks(postgres_url, 2)
            assert not taking.done()
            obstacle.rollback()
        assert committing.result() == 1
        assert taking.result().epoch == 2
        assert_fenced(store, first, run)


def wait_for_locks(url: str, count: int) -> None:
    """Until so many sessions wait for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with psycopg.connect(url, autocommit=True) as connection:
        deadline = time.monotonic() + 20
        while connection.execute(waiting).fetchone() != (count,):
            assert time.monotonic() < deadline
            time.sleep(0.01)
