"""The thread that writes, over a real store: order, outages, fencing, and an end that does not wait for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from harp_batch.cluster.buffer import Buffer
from harp_batch.errors import LeaseLost, StoreFull, StoreUnavailable
from harp_batch.records import Answer, FinishReason
from harp_batch.service.writer import HEARTBEAT, Writer
from harp_batch.store import Attempt, Store, open_store
from tests.support.store_records import a_run, an_answer

RUN = "c0ffee0123456789"
GREEDY = f"{RUN}/greedy"


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    with open_store(sqlite_url) as opened:
        opened.create_run(a_run(id=RUN))
        yield opened


@pytest.fixture
def attempt(store: Store) -> Attempt:
    return store.acquire(RUN, "here", 1, stale_after=15.0)


def a_writer(store: Store, attempt: Attempt, committed: list[Answer] | None = None) -> Writer:
    def mend(answer: Answer, _: ValueError) -> Answer:
        return Answer(
            answer.evaluation_id, answer.doc_id, answer.repeat, FinishReason.ERROR, error="no number"
        )

    told = committed if committed is not None else []
    writer = Writer(store, attempt, lambda: ({"phase": "testing"}, 7.0), told.extend, mend)
    writer.start()
    return writer


def fails(times: int, error: Exception, call: Callable[..., object]) -> Callable[..., object]:
    """``call``, which raises ``error`` so many times first."""
    left = [times]

    def failing(*arguments: object) -> object:
        if left[0] > 0:
            left[0] -= 1
            raise error
        return call(*arguments)

    return failing


def test_answers_are_committed_in_order_and_told_once(store: Store, attempt: Attempt) -> None:
    told: list[Answer] = []
    writer = a_writer(store, attempt, told)
    for start in range(0, 700, 100):
        writer.put([an_answer(GREEDY, doc_id) for doc_id in range(start, start + 100)])
    writer.drain(lambda: False)
    writer.close()
    assert [answer.doc_id for answer in told] == list(range(700))
    assert len(store.answered(GREEDY)) == 700
    (last,) = store.attempts(RUN)
    assert (last.state, last.seconds) == ({"phase": "testing"}, 7.0)


def test_an_outage_is_waited_out(store: Store, attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "commit", fails(4, StoreUnavailable("away"), store.commit))
    writer = a_writer(store, attempt)
    writer.put([an_answer(GREEDY, 0)])
    deadline = time.monotonic() + 20
    while not writer.away and time.monotonic() < deadline:
        time.sleep(0.005)
    assert writer.away
    writer.drain(lambda: False)
    assert not writer.away
    writer.close()
    assert store.answered(GREEDY) == {(0, 0)}


def test_a_value_that_cannot_be_stored_is_that_answers_error_alone(store: Store, attempt: Attempt) -> None:
    writer = a_writer(store, attempt)
    bad = replace(an_answer(GREEDY, 1), seconds=math.nan)
    writer.put([an_answer(GREEDY, 0), bad, an_answer(GREEDY, 2)])
    writer.drain(lambda: False)
    writer.close()
    assert {a.doc_id: a.error for a in store.answers(GREEDY)} == {0: None, 1: "no number", 2: None}


@pytest.mark.parametrize("error", [LeaseLost("another"), StoreFull("full")])
def test_what_waiting_does_not_mend_is_raised(
    store: Store, attempt: Attempt, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "commit", fails(1, error, store.commit))
    writer = a_writer(store, attempt)
    writer.put([an_answer(GREEDY, 0)])
    with pytest.raises(type(error)):
        writer.drain(lambda: False)
    writer.close()
    assert store.answered(GREEDY) == set()


def test_a_driver_that_was_replaced_learns_it_from_its_heartbeat(store: Store, attempt: Attempt) -> None:
    writer = a_writer(store, attempt)
    store.acquire(RUN, "there", 2, stale_after=15.0, taking_over=attempt.epoch)
    time.sleep(1.5 * HEARTBEAT)
    with pytest.raises(LeaseLost):
        writer.check()
    writer.close()


def test_a_request_to_cancel_is_heard(store: Store, attempt: Attempt) -> None:
    writer = a_writer(store, attempt)
    store.request_cancel(RUN)
    deadline = time.monotonic() + 3 * HEARTBEAT
    while not writer.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.close()
    assert writer.cancelled


def test_a_full_buffer_asks_for_a_pause_until_it_has_room() -> None:
    buffer = Buffer(room=10)
    answer = an_answer(GREEDY, 0)
    buffer.add([answer] * (10 // (len(answer.trace) + 1)))
    assert not buffer.full
    buffer.add([answer] * 10)
    assert buffer.full
    buffer.landed(len(buffer))
    assert not buffer.full


def test_the_waits_grow_to_five_seconds_and_start_anew() -> None:
    buffer, now, waits = Buffer(), 100.0, []
    for _ in range(8):
        assert buffer.failed(now) == now - 100.0
        before = now
        while not buffer.may_try(now):
            now += 0.05
        waits.append(now - before)
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5], abs=0.06)
    buffer.landed(0)
    buffer.failed(now)
    assert buffer.may_try(now + 0.11)
