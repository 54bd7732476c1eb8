"""What the driver does, round after round: hear the actors, lease to them, replace those that are lost.

It knows neither Ray nor the time: crew, clock and watcher are handed in, and the tests hand in simulated ones.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from harp_batch.cluster.actor import Reply, error_answer
from harp_batch.cluster.dispatcher import ALONE, Dispatcher, Key, Lease, LeaseId
from harp_batch.errors import RunFailed
from harp_batch.place import host_name
from harp_batch.records import Answer

PATIENCE = 0.25  # seconds that one round waits for replies
LAST_WORDS = 4.0  # seconds that actors get to hand over what is finished when the run is stopped
START_SECONDS = 300.0  # for an actor's first word, where the cluster has room for it
BARREN_LOSSES = 8  # actors lost in a row, per actor, without one answer in between
GIVEN_UP = 10  # requests given up in a row without one answer in between
FAILED_STARTS = 8  # in a row, while nobody else is at work
LONGEST_PAUSE = 60.0  # seconds between two such starts
ABSENCE = 2.0  # seconds between two rounds that are more than the usual delay
NOTES = 20  # losses that are remembered for people


@dataclass(frozen=True, slots=True)
class Lost:
    """An actor that will not be heard again."""

    reason: str
    blameless: bool = False  # what it held has nothing to do with it
    never_started: bool = False  # its code could not be set up, which another try will not change


@dataclass(frozen=True, slots=True)
class Hand:
    """An actor as the crew knows it."""

    name: str
    device: str


class Crew(Protocol):
    """The actors, whatever they run on."""

    def hire(self) -> Hand | None:
        """Start one more actor where the cluster should have another one; None where it should not."""

    def drop(self, name: str) -> None:
        """Kill the actor; nothing more is heard of it."""

    def assign(self, name: str, lease: Lease) -> None:
        """Queue a lease at the actor."""

    def replies(self, patience: float, everyone: bool = False) -> Iterable[tuple[str, Reply | Lost]]:
        """Ask all actors, and wait up to ``patience`` seconds for the first reply, or for everyone's."""

    def has_room(self) -> bool:
        """Whether the cluster could start one more actor now."""


class Clock(Protocol):
    """Time, as the loop needs it."""

    def now(self) -> float:
        """Seconds that never go back."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""


class Watcher(Protocol):
    """Who receives the answers of a run."""

    def answers(self, answers: Sequence[Answer]) -> None:
        """Take ``answers`` over; the caller will not hand them over again."""

    def has_room(self) -> bool:
        """Whether more answers may be decoded; False while too many wait to be stored."""

    def should_stop(self) -> bool:
        """Whether to end now, with what is finished."""

    def tick(self, view: View) -> None:
        """Another round is over."""


@dataclass(frozen=True, slots=True)
class View:
    """The run at one moment, in plain values."""

    actors: tuple[dict[str, Any], ...]  # name, state, host, pid, device, requests, steps
    shards: dict[str, int]  # requests: done, queued, leased, isolated
    losses: int  # actors lost so far
    notes: tuple[str, ...]  # the latest losses, in words


@dataclass(slots=True)
class _Member:
    """One actor, from its start to its loss."""

    hand: Hand
    hired_at: float
    reply: Reply | None = None
    stepped_at: float = 0.0  # when its engine last got on, or had nothing to do

    @property
    def ready(self) -> bool:
        return self.reply is not None and self.reply.ready

    def heard(self, reply: Reply, now: float, owes: bool) -> None:
        before, self.reply = self.reply, reply
        if before is None or not (reply.ready and before.ready and owes) or reply.steps > before.steps:
            self.stepped_at = now


class Loop:
    """One model's way through its shards."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        crew: Crew,
        watcher: Watcher,
        clock: Clock,
        *,
        slots: int,
        hang_timeout: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._crew = crew
        self._watcher = watcher
        self._clock = clock
        self._slots = slots
        self._hang_timeout = hang_timeout
        self._members: dict[str, _Member] = {}
        self._losses = 0
        self._barren = 0  # losses since the last answer
        self._notes: deque[str] = deque(maxlen=NOTES)
        self._looked_at = clock.now()
        self._given_up = 0  # in a row
        self._ever_ready = False
        self._failed_starts = 0  # in a row
        self._hire_at = 0.0  # not before this moment
        self._alone_since: float | None = None  # since when nobody has been heard who has a place

    def run(self) -> bool:
        """Have every request answered; return False where the watcher asked to stop before the end.

        Raises RunFailed where no actor can do the work.
        """
        while not self._dispatcher.done:
            if self._watcher.should_stop():
                self._hear(LAST_WORDS, everyone=True)
                return self._dispatcher.done
            self.turn()
        return True

    def turn(self) -> None:
        """One round."""
        self._hire()
        if self._watcher.has_room():
            self._hear(PATIENCE)
            self._excuse_absence()
            self._drop_hung()
            self._top_up()
        else:
            self._clock.sleep(PATIENCE)
        self._watcher.tick(self._view())

    def _excuse_absence(self) -> None:
        """Nobody is called hung for a time in which nobody listened.

        Too many answers waited for the store, or this very process stood still.
        """
        now = self._clock.now()
        away, self._looked_at = now - self._looked_at, now
        if away > ABSENCE:
            for member in self._members.values():
                member.stepped_at = min(now, member.stepped_at + away)

    # Actors

    def _hire(self) -> None:
        now = self._clock.now()
        while now >= self._hire_at and (hand := self._crew.hire()):
            self._members[hand.name] = _Member(hand, hired_at=now, stepped_at=now)
        waits_for_its_first_place = bool(self._members) and not self._losses
        if waits_for_its_first_place or any(member.reply for member in self._members.values()):
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > START_SECONDS:
            raise RunFailed(
                f"the Ray cluster has had no place for an actor for {START_SECONDS:.0f} s: its nodes are gone; "
                "see `ray status`, and resume the run when there are nodes again"
            )

    def _hear(self, patience: float, everyone: bool = False) -> None:
        for name, reply in self._crew.replies(patience, everyone):
            if isinstance(reply, Lost):
                self._lose(name, reply)
            else:
                self._listen(name, reply)

    def _listen(self, name: str, reply: Reply) -> None:
        member = self._members[name]
        if reply.ready and not member.ready:
            self._ever_ready, self._failed_starts = True, 0
        member.heard(reply, self._clock.now(), owes=self._dispatcher.load(name) > 0)
        by_lease: dict[LeaseId, list[Answer]] = defaultdict(list)
        for lease, answer in reply.answers:
            by_lease[lease].append(answer)
        for lease, answers in by_lease.items():
            self._take(lease, answers)
        if reply.answers:
            self._barren = self._given_up = 0
        if reply.error:
            self._broken(name, reply)

    def _take(self, lease: LeaseId, answers: list[Answer]) -> None:
        """Hand over what counts, once."""
        by_key: dict[Key, Answer] = {}
        for answer in answers:
            by_key.setdefault((answer.doc_id, answer.repeat), answer)
        new = self._dispatcher.accept(lease, by_key)
        if new:
            self._watcher.answers([answer for key, answer in by_key.items() if key in new])

    def _broken(self, name: str, reply: Reply) -> None:
        if reply.ready:
            self._lose(name, Lost(reply.error or ""))
        else:
            reason = f"it could not load the model: {reply.error}"
            self._lose(name, Lost(reason, blameless=True, never_started=True))

    def _lose(self, name: str, lost: Lost) -> None:
        """Forget the actor, and have what it held done again; how often suspects may be lost is the dispatcher's."""
        self._barren += not lost.blameless and not self._dispatcher.isolates(name)
        self._losses += 1
        self._notes.append(f"{name} was lost: {lost.reason}")
        del self._members[name]
        self._crew.drop(name)
        if lost.never_started:
            self._start_failed(lost.reason)
        for lease in self._dispatcher.actor_lost(name, blameless=lost.blameless):
            self._give_up(lease, lost.reason)
        if self._barren > BARREN_LOSSES * (len(self._members) + 1):
            raise RunFailed(f"{self._barren} actors were lost in a row without one answer: {lost.reason}")

    def _start_failed(self, reason: str) -> None:
        """Once an actor has worked, another one's failed start may pass: what went before may still hold the device."""
        self._failed_starts += 1
        at_work = any(member.ready for member in self._members.values())
        if not at_work and (not self._ever_ready or self._failed_starts > FAILED_STARTS):
            raise RunFailed(f"an actor could not start: {reason}")
        self._hire_at = self._clock.now() + min(2.0**self._failed_starts, LONGEST_PAUSE)

    def _give_up(self, lease: Lease, reason: str) -> None:
        message = f"given up after {ALONE} actors were lost with it alone: {reason}"
        errors = [error_answer(lease.evaluation_id, request, message) for request in lease.requests]
        self._notes.extend(f"document {r.doc_id} of {r.task}: {message}" for r in lease.requests)
        self._take(lease.id, errors)
        self._given_up += 1
        if self._given_up > GIVEN_UP:
            raise RunFailed(
                f"{self._given_up} requests in a row killed every actor that they were given to: {reason}"
            )

    def _drop_hung(self) -> None:
        """A stopped process raises nothing, ever: what has not moved for too long is replaced."""
        now = self._clock.now()
        for name, member in list(self._members.items()):
            if member.ready and now - member.stepped_at > self._hang_timeout:
                self._lose(name, Lost(f"it had not made a step for {self._hang_timeout:g} s"))
            elif not member.ready and now - member.stepped_at > START_SECONDS and self._is_placed(member):
                self._lose(name, Lost(f"it was not heard from for {START_SECONDS:g} s"))

    def _is_placed(self, member: _Member) -> bool:
        """Whether the actor has a place in the cluster, and does not just wait for one."""
        return member.reply is not None or self._crew.has_room()

    # Work

    def _top_up(self) -> None:
        """Lease to ready actors, in turns, until each has a full backlog and none more than its share."""
        actors = max(len(self._members), 1)
        share = min(2 * self._slots, -(-self._dispatcher.remaining // actors))
        hungry = [name for name, m in self._members.items() if m.ready]
        while hungry := [name for name in hungry if self._dispatcher.load(name) < share]:
            leases = [(name, self._dispatcher.next_for(name)) for name in hungry]
            hungry = [name for name, lease in leases if lease]
            for name, lease in leases:
                if lease:
                    self._crew.assign(name, lease)

    def _view(self) -> View:
        return View(
            actors=tuple(map(self._shown, self._members.values())),
            shards=asdict(self._dispatcher.standing),
            losses=self._losses,
            notes=tuple(self._notes),
        )

    def _shown(self, member: _Member) -> dict[str, Any]:
        reply, name = member.reply, member.hand.name
        return {
            "name": name,
            "state": self._state(member),
            "host": host_name(reply.place) if reply else None,
            "pid": reply.pid if reply else None,
            "device": member.hand.device,
            "requests": self._dispatcher.load(name),
            "steps": reply.steps if reply else 0,
        }

    def _state(self, member: _Member) -> str:
        if member.reply is None and self._clock.now() - member.hired_at > LAST_WORDS * 4:
            return "starting" if self._crew.has_room() else "waiting for resources"
        if not member.ready:
            return "starting"
        return "decoding" if self._dispatcher.load(member.hand.name) else "idle"
