"""Answers on their way into the store: held until they are committed, for as long as the store is away.

A pure state machine, without a clock of its own, a thread or a database; the service's writer runs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from harp_batch.records import Answer

ROOM = 500_000  # trace tokens that may wait before decoding pauses; some 100 MB
BATCH = 256  # answers a transaction
FIRST_WAIT = 0.1  # seconds after the first failure; twice as long after each further one
LONGEST_WAIT = 5.0  # seconds


class Buffer:
    """Keeps answers in order until the store has them."""

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._waiting: deque[Answer] = deque()
        self._tokens = 0
        self._wait = FIRST_WAIT
        self._next_try = 0.0
        self._away_since: float | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether decoding should pause."""
        return self._tokens >= self._room

    def add(self, answers: Sequence[Answer]) -> None:
        """Take ``answers`` over."""
        self._waiting.extend(answers)
        self._tokens += sum(map(_weight, answers))

    def batch(self) -> list[Answer]:
        """The oldest answers, to be committed together; they stay here until `landed`."""
        return [self._waiting[i] for i in range(min(len(self._waiting), BATCH))]

    def may_try(self, now: float) -> bool:
        """Whether the store should be asked at all; after a failure it gets some time."""
        return now >= self._next_try

    def landed(self, count: int) -> None:
        """The oldest ``count`` answers are in the store, which therefore works."""
        for _ in range(count):
            self._tokens -= _weight(self._waiting.popleft())
        self._wait = FIRST_WAIT
        self._away_since = None

    def failed(self, now: float) -> float:
        """The store did not answer. Returns for how many seconds it has been away."""
        self._next_try = now + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        if self._away_since is None:
            self._away_since = now
        return now - self._away_since


def _weight(answer: Answer) -> int:
    return len(answer.trace) + 1
