"""Who decodes what: shards go out as leases and come back as answers.

A pure state machine, with no Ray, no clock and no I/O. Its rules:

- Shards leave the queue in order; a lease holds only those requests of a shard that still lack an answer.
- A lease is current until its actor is lost. Answers of a lease that is not current are refused, so that an
  actor given up for dead can never add to what its successor does.
- An answer counts once.
- An actor works on one evaluation at a time: rows of two methods in one forward would share its time, and the
  cheap rides would make a speed comparison between them worthless.
- A request that was held by `IN_COMPANY` actors when they were lost is a suspect. It waits until nothing else is
  queued, and then has an actor to itself. Where that kills the actor `ALONE` times, it is given up: its lease comes
  back as one of no actor, and the driver records an error as its answer. Fewer losses would not do: actors are also
  killed for reasons that are not the request's, and those must never cost an answer.
- Losses that are known to be nobody's fault, such as a node's end, make nobody a suspect.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from harp_batch.records import Request, Shard

IN_COMPANY = 2
ALONE = 3

Key = tuple[int, int]  # (doc_id, repeat)
LeaseId = tuple[int, int]  # (shard id, epoch)


@dataclass(frozen=True, slots=True)
class Lease:
    """The requests of one shard that one actor answers; ``actor`` is None where a request was given up."""

    shard_id: int
    epoch: int  # 1 for the first attempt at this shard
    evaluation_id: str
    actor: str | None
    requests: tuple[Request, ...]

    @property
    def id(self) -> LeaseId:
        """What an actor sends back with every answer."""
        return self.shard_id, self.epoch


@dataclass(frozen=True, slots=True)
class Standing:
    """Requests by where they are."""

    done: int
    queued: int
    leased: int
    isolated: int  # suspects, waiting or leased


@dataclass(slots=True)
class _Open:
    """A shard with requests that lack an answer."""

    shard: Shard
    missing: dict[Key, Request]
    suspect: bool = False  # one request, to be decoded alone
    losses: int = 0  # actors that were lost with it, for reasons unknown
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

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._open: dict[int, _Open] = {}
        self._queue: deque[int] = deque()
        self._isolated: deque[int] = deque()
        self._by_actor: dict[str, dict[int, _Open]] = {}  # what each holds, by shard
        self._done = 0
        self._remaining = 0
        for shard in shards:
            self._add(_Open(shard, {(r.doc_id, r.repeat): r for r in shard.requests}), self._queue)
        self._next_id = max(self._open, default=-1) + 1

    def _add(self, shard: _Open, queue: deque[int]) -> None:
        if shard.missing:
            self._open[shard.shard.id] = shard
            self._remaining += len(shard.missing)
            queue.append(shard.shard.id)

    @property
    def done(self) -> bool:
        """Whether every request has its answer."""
        return not self._open

    @property
    def remaining(self) -> int:
        """How many requests lack an answer, leased or not."""
        return self._remaining

    @property
    def standing(self) -> Standing:
        """Where the requests are."""
        sizes = [(o.suspect, o.lease is not None, len(o.missing)) for o in self._open.values()]
        return Standing(
            done=self._done,
            queued=sum(n for suspect, leased, n in sizes if not suspect and not leased),
            leased=sum(n for suspect, leased, n in sizes if not suspect and leased),
            isolated=sum(n for suspect, _, n in sizes if suspect),
        )

    def load(self, actor: str) -> int:
        """How many requests ``actor`` holds that lack an answer."""
        return sum(len(o.missing) for o in self._held(actor))

    def isolates(self, actor: str) -> bool:
        """Whether ``actor`` holds a suspect."""
        return any(o.suspect for o in self._held(actor))

    def next_for(self, actor: str) -> Lease | None:
        """Lease the first queued shard to ``actor``; None when there is none that it may have now.

        Suspects go out when no shard is queued, to actors that hold nothing.
        """
        if self.isolates(actor):
            return None
        held = self._held(actor)
        if self._queue:
            evaluation = self._open[self._queue[0]].shard.evaluation_id
            fits = all(o.shard.evaluation_id == evaluation for o in held)
            return self._grant(self._queue.popleft(), actor) if fits else None
        if self._isolated and not held:
            return self._grant(self._isolated.popleft(), actor)
        return None

    def _grant(self, shard_id: int, actor: str) -> Lease:
        shard = self._open[shard_id]
        self._by_actor.setdefault(actor, {})[shard_id] = shard
        return shard.grant(actor)

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

    def actor_lost(self, actor: str, *, blameless: bool = False) -> list[Lease]:
        """Take back what ``actor`` held, to be the next to go out; return the leases of requests given up."""
        given_up = []
        for held in reversed(self._by_actor.pop(actor, {}).values()):
            held.lease = None
            held.losses += not blameless
            if held.suspect and held.losses >= IN_COMPANY + ALONE:
                given_up.append(held.grant(None))
            elif held.suspect:
                self._isolated.append(held.shard.id)  # last: whatever ails the actors may pass
            elif held.losses >= IN_COMPANY:
                self._isolate(held)
            else:
                self._queue.appendleft(held.shard.id)
        return given_up

    def _isolate(self, shard: _Open) -> None:
        """Make every missing request of ``shard`` a shard of its own."""
        del self._open[shard.shard.id]
        self._remaining -= len(shard.missing)
        for key, request in shard.missing.items():
            alone = Shard(self._next_id, shard.shard.evaluation_id, (request,))
            self._add(_Open(alone, {key: request}, suspect=True, losses=shard.losses), self._isolated)
            self._next_id += 1

    def _held(self, actor: str) -> Collection[_Open]:
        return self._by_actor.get(actor, {}).values()

    def _settle(self, shard: _Open, keys: set[Key]) -> None:
        for key in keys:
            del shard.missing[key]
        self._done += len(keys)
        self._remaining -= len(keys)
        if not shard.missing:
            del self._open[shard.shard.id]
            if shard.lease is not None and shard.lease.actor is not None:
                del self._by_actor[shard.lease.actor][shard.shard.id]
