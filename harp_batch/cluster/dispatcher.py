"""Who decodes what: shards go out as leases and come back as answers.

A pure state machine, with no Ray, no clock and no I/O. Its rules:

- Shards leave the queue in order; a lease holds only those requests of a shard that still lack an answer.
- A lease is current until its actor is lost. Answers of a lease that is not current are refused, so that an
  actor given up for dead can never add to what its successor does.
- An answer counts once.
- An actor works on one evaluation at a time: rows of two methods in one forward would share its time, and the
  cheap rides would make a speed comparison between them worthless.
- A shard whose last allowed attempt was lost comes back as a lease of no actor: the driver records an error
  for each of its requests and accepts those like any other answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from harp_batch.records import Request, Shard

Key = tuple[int, int]  # (doc_id, repeat)
LeaseId = tuple[int, int]  # (shard id, epoch)


@dataclass(frozen=True, slots=True)
class Lease:
    """The requests of one shard that one actor answers; ``actor`` is None where attempts are exhausted."""

    shard_id: int
    epoch: int  # 1 for the first attempt at this shard
    evaluation_id: str
    actor: str | None
    requests: tuple[Request, ...]

    @property
    def id(self) -> LeaseId:
        """What an actor sends back with every answer."""
        return self.shard_id, self.epoch


@dataclass(slots=True)
class _Open:
    """A shard with requests that lack an answer."""

    shard: Shard
    missing: dict[Key, Request]
    epoch: int = 0
    lease: Lease | None = None  # the current one

    def grant(self, actor: str | None) -> Lease:
        self.epoch += 1
        requests = tuple(self.missing.values())
        self.lease = Lease(self.shard.id, self.epoch, self.shard.evaluation_id, actor, requests)
        return self.lease


def cut(shards_from: int, evaluation_id: str, requests: Iterable[Request], size: int) -> Iterator[Shard]:
    """Yield ``requests`` as shards of at most ``size``, in order, with ids from ``shards_from`` on."""
    pending = tuple(requests)
    for number, start in enumerate(range(0, len(pending), size)):
        yield Shard(shards_from + number, evaluation_id, pending[start : start + size])


class Dispatcher:
    """Hands out every request of ``shards`` until each has exactly one answer."""

    def __init__(self, shards: Iterable[Shard], max_attempts: int = 3) -> None:
        self._max_attempts = max_attempts
        self._open = {s.id: _Open(s, {(r.doc_id, r.repeat): r for r in s.requests}) for s in shards}
        self._open = {number: o for number, o in self._open.items() if o.missing}
        self._queue = deque(self._open)

    @property
    def done(self) -> bool:
        """Whether every request has its answer."""
        return not self._open

    @property
    def remaining(self) -> int:
        """How many requests lack an answer, leased or not."""
        return sum(len(o.missing) for o in self._open.values())

    def load(self, actor: str) -> int:
        """How many requests ``actor`` holds that lack an answer."""
        return sum(len(o.missing) for o in self._held(actor))

    def next_for(self, actor: str) -> Lease | None:
        """Lease the first queued shard to ``actor``; None when there is none that it may have now."""
        if not self._queue or not self._fits(self._open[self._queue[0]], actor):
            return None
        return self._open[self._queue.popleft()].grant(actor)

    def _fits(self, shard: _Open, actor: str) -> bool:
        """Whether ``actor`` holds nothing of another evaluation."""
        return all(o.shard.evaluation_id == shard.shard.evaluation_id for o in self._held(actor))

    def fresh(self, lease: LeaseId, keys: Iterable[Key]) -> set[Key]:
        """Those of ``keys`` that would count as answers of ``lease`` now; changes nothing."""
        shard = self._open.get(lease[0])
        if shard is None or shard.lease is None or shard.lease.id != lease:
            return set()
        return shard.missing.keys() & set(keys)

    def accept(self, lease: LeaseId, keys: Iterable[Key]) -> set[Key]:
        """Count the answers ``keys`` of ``lease``; return those that were new."""
        new = self.fresh(lease, keys)
        if new:
            self._settle(self._open[lease[0]], new)
        return new

    def actor_lost(self, actor: str) -> list[Lease]:
        """Take back what ``actor`` held, to be the next to go out; return the leases to record as errors."""
        given_up = []
        for held in reversed(list(self._held(actor))):
            if held.epoch >= self._max_attempts:
                given_up.append(held.grant(None))
            else:
                held.lease = None
                self._queue.appendleft(held.shard.id)
        return given_up

    def _held(self, actor: str) -> Iterator[_Open]:
        return (o for o in self._open.values() if o.lease is not None and o.lease.actor == actor)

    def _settle(self, shard: _Open, keys: set[Key]) -> None:
        for key in keys:
            del shard.missing[key]
        if not shard.missing:
            del self._open[shard.shard.id]
