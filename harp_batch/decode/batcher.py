"""Who is in the batch: admit, choose this step's work, retire. No tensors here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from harp_batch.decode.sequence import SHORT_CHUNK, Scoring, Sequence, Work

_LENGTH_BLOCK = 128  # pools are resized in multiples of this many positions


@dataclass(frozen=True, slots=True)
class Limits:
    """What the batch may use."""

    slots: int  # requests worked at together
    positions: int  # KV budget: slots x length never exceeds it (but for one request on its own)
    step_rows: int  # prompt and reframed rows in one forward


@dataclass(frozen=True, slots=True)
class Move:
    """Keys and values that must change slots."""

    source: int
    target: int
    length: int


class Batcher:
    """Sequences in dense slots, scorings beside them, the rest in a queue (first come, first served)."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.length = 0  # positions of each slot
        self.live: list[Sequence] = []  # index = slot
        self.scoring: list[Scoring] = []
        self.waiting: deque[Sequence | Scoring] = deque()
        self._arrivals = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.live or self.scoring or self.waiting)

    @property
    def slots(self) -> int:
        """Slots that the budget allows at the present length."""
        return self._slots_at(self.length)

    def add(self, owner: Sequence | Scoring) -> None:
        """Queue a request."""
        owner.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(owner)

    def admit(self) -> None:
        """Let in whoever is first in the queue, as long as there is room; may make the slots longer."""
        if not self.live:
            self.length = 0
        while self.waiting and self._let_in(self.waiting[0]):
            self.waiting.popleft()

    def _let_in(self, owner: Sequence | Scoring) -> bool:
        if len(self.live) + len(self.scoring) >= self.limits.slots:
            return False
        if isinstance(owner, Scoring):
            self.scoring.append(owner)
            return True
        length = self._length_for(owner)
        if len(self.live) >= self._slots_at(length):
            return False
        self.length = length
        owner.slot = len(self.live)
        self.live.append(owner)
        return True

    def _length_for(self, owner: Sequence) -> int:
        """The slot length that fits ``owner``: looks ahead while the batch is empty, so as to grow once."""
        ahead = list(self.waiting)[: self.limits.slots] if not self.live else []
        needs = [owner.need, *(o.need for o in ahead if isinstance(o, Sequence) and self._cheap(o.need))]
        return max(self.length, -(-max(needs) // _LENGTH_BLOCK) * _LENGTH_BLOCK)

    def _cheap(self, need: int) -> bool:
        """Making room for it costs no slot."""
        return self._slots_at(need + _LENGTH_BLOCK) == self.limits.slots

    def _slots_at(self, length: int) -> int:
        return max(1, min(self.limits.slots, self.limits.positions // max(length, 1)))

    def work(self) -> list[Work]:
        """This step's chunks: all short ones, and longer ones as far as the row limit goes.

        The oldest goes first, so that nobody waits for ever; then sequences by age, then scorings, the longest first,
        behind which the shorter ones fill up the forward.
        """
        sequences = [w for s in sorted(self.live, key=lambda s: s.arrival) for w in s.work()]
        scorings = [w for s in self.scoring for w in s.work()]
        scorings.sort(key=lambda w: -len(w.chunk))
        short = [w for w in sequences if len(w.chunk) <= SHORT_CHUNK]
        longer = [w for w in sequences if len(w.chunk) > SHORT_CHUNK] + scorings
        oldest = min((w.owner.arrival for w in longer), default=0)
        longer.sort(key=lambda w: w.owner.arrival != oldest)
        return short + list(_within(longer, self.limits.step_rows))

    def retire(self) -> list[Move]:
        """Drop what is done; the moves that keep the slots dense."""
        self.scoring = [s for s in self.scoring if not s.done]
        moves = []
        for slot in reversed(range(len(self.live))):
            if self.live[slot].done:
                moves.extend(self._vacate(slot))
        return moves

    def _vacate(self, slot: int) -> list[Move]:
        last = self.live.pop()
        if slot == len(self.live):
            return []
        source, last.slot = len(self.live), slot
        self.live[slot] = last
        return [Move(source, slot, max(last.cached, last.reframed_cached))]

    def evict(self) -> None:
        """Send everyone back to the head of the queue, to start again."""
        owners: list[Sequence | Scoring] = [*self.live, *self.scoring]
        for owner in sorted(owners, key=lambda o: o.arrival, reverse=True):
            owner.restart()
            self.waiting.appendleft(owner)
        self.live, self.scoring, self.length = [], [], 0

    def drop(self, ticket: object) -> None:
        """Forget every queued or scoring owner with this ticket."""
        self.waiting = deque(o for o in self.waiting if o.ticket != ticket)
        self.scoring = [s for s in self.scoring if s.ticket != ticket]


def _within(offers: list[Work], rows: int) -> Iterator[Work]:
    """The offers that fit into ``rows``, the first come first; at least that one, however long."""
    used = 0
    for work in offers:
        if not used or used + len(work.chunk) <= rows:
            used += len(work.chunk)
            yield work
