"""The dispatcher's promises: nothing lost, nothing twice, always an end."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from harp_batch.cluster.dispatcher import ALONE, IN_COMPANY, Dispatcher, Lease, Standing, cut
from harp_batch.records import Request, RequestKind, Shard


def requests(count: int, first: int = 0) -> list[Request]:
    return [Request("t", doc, 0, RequestKind.GENERATE, "p", (1,)) for doc in range(first, first + count)]


def shards(*sizes: int) -> list[Shard]:
    """One evaluation a shard, so that (evaluation, doc_id) is unique."""
    return [Shard(number, "e", tuple(requests(size))) for number, size in enumerate(sizes)]


def two_a_piece(sizes: list[int]) -> list[Shard]:
    """Shards 0 and 1 of one evaluation, 2 and 3 of the next, and so on; no document twice."""
    return [
        Shard(number, f"e{number // 2}", tuple(requests(size, 100 * number)))
        for number, size in enumerate(sizes)
    ]


def keys(lease: Lease) -> list[tuple[int, int]]:
    return [(r.doc_id, r.repeat) for r in lease.requests]


def leased(dispatcher: Dispatcher, actor: str) -> Lease:
    lease = dispatcher.next_for(actor)
    assert lease is not None
    return lease


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(0, 4, []), (4, 4, [4]), (9, 4, [4, 4, 1]), (3, 1, [1, 1, 1])]
)
def test_cut_keeps_order_and_size(count: int, size: int, sizes: list[int]) -> None:
    pieces = list(cut(7, "e", requests(count), size))
    assert [len(piece.requests) for piece in pieces] == sizes
    assert [piece.id for piece in pieces] == list(range(7, 7 + len(sizes)))
    assert [r for piece in pieces for r in piece.requests] == requests(count)


def test_shards_leave_in_order_and_then_none() -> None:
    dispatcher = Dispatcher(shards(2, 2, 1))
    assert [leased(dispatcher, a).shard_id for a in "aba"] == [0, 1, 2]
    assert dispatcher.next_for("a") is None
    assert (dispatcher.load("a"), dispatcher.load("b"), dispatcher.remaining) == (3, 2, 5)


def test_an_actor_works_on_one_evaluation_at_a_time() -> None:
    dispatcher = Dispatcher(two_a_piece([1, 1, 2]))
    first = [leased(dispatcher, "a"), leased(dispatcher, "a")]
    assert dispatcher.next_for("a") is None
    dispatcher.accept(first[0].id, keys(first[0]))
    assert dispatcher.next_for("a") is None
    dispatcher.accept(first[1].id, keys(first[1]))
    assert leased(dispatcher, "a").evaluation_id == "e1"


def test_an_idle_actor_may_begin_the_next_evaluation() -> None:
    dispatcher = Dispatcher(two_a_piece([1, 1, 2]))
    assert [leased(dispatcher, a).evaluation_id for a in "aab"] == ["e0", "e0", "e1"]


def test_no_shards_and_empty_shards_are_done() -> None:
    assert Dispatcher([]).done
    assert Dispatcher(shards(0, 0)).done


def test_an_answer_counts_once() -> None:
    dispatcher = Dispatcher(shards(2))
    lease = leased(dispatcher, "a")
    assert dispatcher.accept(lease.id, [(0, 0)]) == {(0, 0)}
    assert dispatcher.accept(lease.id, [(0, 0), (1, 0)]) == {(1, 0)}
    assert dispatcher.done
    assert dispatcher.accept(lease.id, [(1, 0)]) == set()


def test_fresh_changes_nothing() -> None:
    dispatcher = Dispatcher(shards(2))
    lease = leased(dispatcher, "a")
    assert dispatcher.fresh(lease.id, [(0, 0)]) == dispatcher.fresh(lease.id, [(0, 0)]) == {(0, 0)}
    assert dispatcher.remaining == 2


def test_answers_to_questions_nobody_asked_are_refused() -> None:
    dispatcher = Dispatcher(shards(2))
    lease = leased(dispatcher, "a")
    assert dispatcher.accept(lease.id, [(99, 0), (0, 1)]) == set()
    assert dispatcher.accept((5, 1), [(0, 0)]) == set()


def test_a_lost_actor_returns_only_what_it_had_not_answered_and_it_goes_out_first() -> None:
    dispatcher = Dispatcher(shards(3, 2, 2))
    first, second = leased(dispatcher, "a"), leased(dispatcher, "a")
    dispatcher.accept(first.id, [(1, 0)])
    assert dispatcher.actor_lost("a") == []
    again = [leased(dispatcher, "b") for _ in range(3)]
    assert [lease.shard_id for lease in again] == [0, 1, 2]
    assert keys(again[0]) == [(0, 0), (2, 0)]
    assert keys(again[1]) == keys(second)


def test_answers_of_an_old_epoch_are_refused() -> None:
    dispatcher = Dispatcher(shards(2))
    old = leased(dispatcher, "a")
    dispatcher.actor_lost("a")
    assert dispatcher.accept(old.id, keys(old)) == set()
    new = leased(dispatcher, "b")
    assert dispatcher.accept(old.id, keys(old)) == set()
    assert dispatcher.accept(new.id, keys(new)) == set(keys(new))


def test_losing_an_actor_twice_costs_one_attempt() -> None:
    dispatcher = Dispatcher(shards(1))
    leased(dispatcher, "a")
    assert dispatcher.actor_lost("a") == []
    assert dispatcher.actor_lost("a") == []
    assert leased(dispatcher, "b").epoch == 2


def lose(dispatcher: Dispatcher, times: int) -> None:
    """Lease all that one actor may have, and lose it, so many times."""
    for _ in range(times):
        while dispatcher.next_for("doomed"):
            pass
        assert dispatcher.actor_lost("doomed") == []


def test_suspects_wait_for_the_others_and_are_alone() -> None:
    dispatcher = Dispatcher(shards(2, 1))
    for _ in range(IN_COMPANY):
        leased(dispatcher, "a")
        dispatcher.actor_lost("a")
    assert dispatcher.standing == Standing(done=0, queued=1, leased=0, isolated=2)
    innocent = leased(dispatcher, "b")
    assert innocent.shard_id == 1
    assert dispatcher.next_for("b") is None  # it holds something
    dispatcher.accept(innocent.id, keys(innocent))
    alone = [leased(dispatcher, actor) for actor in "bc"]
    assert [keys(lease) for lease in alone] == [[(0, 0)], [(1, 0)]]
    assert dispatcher.next_for("b") is None


def test_a_request_that_kills_every_actor_is_given_up_and_must_be_accepted() -> None:
    dispatcher = Dispatcher(shards(2))
    lose(dispatcher, IN_COMPANY)
    saved = leased(dispatcher, "b")
    assert dispatcher.accept(saved.id, keys(saved)) == {(0, 0)}
    lose(dispatcher, ALONE - 1)
    assert keys(leased(dispatcher, "c")) == [(1, 0)]
    (given_up,) = dispatcher.actor_lost("c")
    assert (given_up.actor, keys(given_up)) == (None, [(1, 0)])
    assert dispatcher.accept(given_up.id, keys(given_up)) == {(1, 0)}
    assert dispatcher.done


def test_losses_without_blame_make_nobody_a_suspect() -> None:
    dispatcher = Dispatcher(shards(2))
    for _ in range(20):
        leased(dispatcher, "a")
        assert dispatcher.actor_lost("a", blameless=True) == []
    assert dispatcher.standing == Standing(done=0, queued=2, leased=0, isolated=0)


class DispatcherMachine(RuleBasedStateMachine):
    """Actors that answer, lie, stall and die in any order; the oracle is a plain tally of answers."""

    @initialize(sizes=st.lists(st.integers(0, 4), max_size=5))
    def start(self, sizes: list[int]) -> None:
        shards = two_a_piece(sizes)
        self.dispatcher = Dispatcher(shards)
        self.wanted = {(s.evaluation_id, r.doc_id, r.repeat) for s in shards for r in s.requests}
        self.accepted: list[tuple[str, int, int]] = []
        self.leases: list[Lease] = []  # every lease ever, current or not
        self.dead: set[str | None] = set()
        self.names = iter(range(10_000))
        self.actors = ["x", "y"]

    @rule(which=st.integers(0, 1))
    def lease(self, which: int) -> None:
        lease = self.dispatcher.next_for(self.actors[which])
        if lease is not None:
            assert {(lease.evaluation_id, *key) for key in keys(lease)}.isdisjoint(self.accepted)
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        answered = data.draw(st.lists(st.sampled_from([*keys(lease), (77, 0)]), max_size=6))
        new = self.dispatcher.accept(lease.id, answered)
        assert not new or lease.actor not in self.dead
        self.accepted += [(lease.evaluation_id, *key) for key in new]

    @rule(which=st.integers(0, 1), blameless=st.booleans())
    def lose(self, which: int, blameless: bool) -> None:
        lost = self.actors[which]
        self.leases += self.dispatcher.actor_lost(lost, blameless=blameless)
        self.dead.add(lost)
        self.actors[which] = f"actor-{next(self.names)}"

    @invariant()
    def nothing_twice_and_nothing_invented(self) -> None:
        if hasattr(self, "dispatcher"):
            assert len(self.accepted) == len(set(self.accepted))
            assert self.wanted.issuperset(self.accepted)
            assert self.dispatcher.remaining == len(self.wanted) - len(self.accepted)
            assert self.dispatcher.done == (self.dispatcher.remaining == 0)
            standing = self.dispatcher.standing
            assert standing.done == len(self.accepted)
            assert standing.queued + standing.leased + standing.isolated == self.dispatcher.remaining

    def teardown(self) -> None:
        """From any state, an actor that works ends it, and everything is answered once."""
        if not hasattr(self, "dispatcher"):
            return
        for actor in self.actors:
            self.leases += self.dispatcher.actor_lost(actor)
        for lease in self.leases:
            self.accept_all(lease)
        while lease := self.dispatcher.next_for("last"):
            self.accept_all(lease)
        assert self.dispatcher.done
        assert sorted(self.accepted) == sorted(self.wanted)

    def accept_all(self, lease: Lease) -> None:
        new = self.dispatcher.accept(lease.id, keys(lease))
        self.accepted += [(lease.evaluation_id, *key) for key in new]


DispatcherMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestDispatcherStates = DispatcherMachine.TestCase
