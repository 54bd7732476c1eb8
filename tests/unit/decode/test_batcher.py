"""What goes along in a step, and in which order."""

from __future__ import annotations

from harp_batch.decode import Engine, Greedy, Harp
from harp_batch.decode.batcher import Batcher, Limits
from harp_batch.decode.chunk import Chunk
from harp_batch.decode.sequence import Scoring, Sequence
from tests.support.tiny import tiny_model


def scoring(length: int, ticket: str = "") -> Scoring:
    return Scoring(
        ticket=ticket or str(length),
        key="",
        seed=0,
        method=Greedy(),
        context=(5,) * length,
        continuations=((6,),),
    )


def sequence(prompt: int) -> Sequence:
    return Sequence(
        ticket=f"s{prompt}",
        key="",
        seed=0,
        method=Greedy(),
        tokens=[5] * prompt,
        prompt_tokens=prompt,
        max_new_tokens=4,
        stop=lambda new: False,
    )


def batcher(rows: int, slots: int = 8) -> Batcher:
    return Batcher(Limits(slots=slots, positions=10_000, step_rows=rows))


def test_scorings_are_packed_by_rows_longest_first_but_for_the_oldest() -> None:
    b = batcher(rows=100)
    for length in (20, 60, 30, 50, 10):
        b.add(scoring(length))
    b.admit()
    assert [len(w.chunk) for w in b.work()] == [20, 60, 10]


def test_the_oldest_goes_even_where_it_exceeds_the_limit() -> None:
    b = batcher(rows=100)
    for owner in (scoring(300), sequence(40), scoring(20)):
        b.add(owner)
    b.admit()
    assert [len(w.chunk) for w in b.work()] == [300]


def test_sequences_and_scorings_share_the_slots() -> None:
    b = batcher(rows=100, slots=2)
    for owner in (scoring(9), sequence(8), scoring(7)):
        b.add(owner)
    b.admit()
    assert (len(b.live), len(b.scoring), len(b.waiting)) == (1, 1, 1)


def test_sequences_go_before_scorings_and_short_chunks_always() -> None:
    b = batcher(rows=100)
    for owner in (
        sequence(50),
        scoring(45),
        sequence(30),
        sequence(12),
        sequence(40),
        sequence(16),
        scoring(20),
    ):
        b.add(owner)
    b.admit()
    assert [len(w.chunk) for w in b.work()] == [12, 16, 50, 30, 20]


def test_eviction_keeps_the_order_of_arrival() -> None:
    b = batcher(rows=100, slots=3)
    for owner in (sequence(9), scoring(8), sequence(7), sequence(6), sequence(5)):
        b.add(owner)
    b.admit()
    b.evict()
    assert not b.live
    assert not b.scoring
    assert [o.ticket for o in b.waiting] == ["s9", "8", "s7", "s6", "s5"]


def forwards(theta: float, new_tokens: int) -> list[list[Chunk]]:
    """Every forward of one prompt under HARP with one mask a sequence."""
    engine = Engine(tiny_model("llama"), slots=2)
    seen: list[list[Chunk]] = []
    forward = engine.runner.forward

    def watch(chunks: list[Chunk]) -> object:
        seen.append(list(chunks))
        return forward(chunks)

    engine.runner.forward = watch  # type: ignore[method-assign,assignment]
    engine.generate([[5, 6, 7, 8]], method=Harp(theta=theta, mask="sequence"), max_new_tokens=new_tokens)
    return seen


def test_a_sequence_that_hesitates_often_is_not_made_to_wait() -> None:
    seen = forwards(theta=0.0, new_tokens=10)
    assert len(seen) == 1 + 10  # the first token is parked; from then on both streams go along
    assert [[len(c) for c in chunks] for chunks in seen[2:]] == [[1, 1]] * 9
    assert all(chunks[1].mask for chunks in seen[2:])


def test_a_sequence_that_never_hesitates_pays_nothing_for_the_other_stream() -> None:
    assert [[c.mask for c in chunks] for chunks in forwards(theta=99.0, new_tokens=10)] == [[None]] * 10
