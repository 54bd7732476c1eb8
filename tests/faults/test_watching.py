"""What the fault suite would say if answers were lost, replaced or there twice."""

from __future__ import annotations

from tests.faults.disturbing import DATABASES, LAYOUTS, draw, recomputed
from tests.faults.striking import Fault, Kind
from tests.faults.watching import Rows, by_key, tally


def row(doc_id: int, tokens: int = 5, seconds: float = 0.5) -> tuple[object, ...]:
    return ("tiny", "sums", "greedy", doc_id, 0, "text", True, "length", tokens, 9, seconds, None)


def rows(*found: tuple[object, ...]) -> Rows:
    return by_key(found)


def test_every_answer_there_once() -> None:
    found = tally(3, [row(0), row(1), row(2)], [rows(), rows(row(1))])
    assert (found.answers, found.lost, found.doubled, found.tokens) == (3, 0, 0, 15)


def test_an_answer_that_never_came_is_lost() -> None:
    assert tally(3, [row(0), row(1)], []).lost == 1


def test_an_answer_that_was_seen_and_is_gone_is_lost_once() -> None:
    assert tally(3, [row(0), row(1)], [rows(row(2)), rows(row(2))]).lost == 1


def test_two_rows_of_one_answer_are_doubled() -> None:
    assert tally(2, [row(0), row(1), row(1, seconds=0.6)], []).doubled == 1


def test_an_answer_that_was_decoded_anew_and_replaced_is_doubled() -> None:
    found = tally(2, [row(0), row(1, seconds=0.6)], [rows(row(1))])
    assert (found.lost, found.doubled) == (0, 1)


def test_a_fault_recomputes_no_more_than_the_longest_answers_that_were_missing() -> None:
    final = rows(row(0, tokens=100), row(1, tokens=7), row(2, tokens=5), row(3, tokens=3))
    faults = [
        Fault(Kind.ACTOR_KILLED, 1, 1.0, in_flight=2),
        Fault(Kind.DATABASE_RESTARTED, 2, 1.0, in_flight=0),
    ]
    seen = [rows(row(0, tokens=100)), rows(row(0, tokens=100), row(1, tokens=7))]
    assert recomputed(faults, seen, final) == 7 + 5


def test_twenty_seeds_bring_everything() -> None:
    plans = [draw(seed, kills=10) for seed in range(20)]
    assert {(p.layout, p.database) for p in plans} == {(la, db) for la in LAYOUTS for db in DATABASES}
    assert all(sum(kind.is_kill for kind in plan.kinds) == 10 for plan in plans)
    struck = [kind for plan in plans for kind in plan.kinds]
    assert set(struck) == set(Kind) - {Kind.DATABASE_AWAY}
    assert struck.count(Kind.DATABASE_RESTARTED) == 10
    assert all(p.database == "postgresql" for p in plans if any(kind.is_of_database for kind in p.kinds))
    assert draw(7, kills=10) == plans[7]
