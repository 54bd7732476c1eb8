"""The poll loop: Ray actors on one side, the dispatcher on the other, answers to the caller in between.

Ray restarts nothing and retries nothing: a lost actor's unfinished requests go back to the dispatcher, and a
fresh actor takes its place.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from harp_batch.cluster.actor import Recipe, Reply, Worker, error_answer
from harp_batch.cluster.dispatcher import Dispatcher, Lease, LeaseId
from harp_batch.cluster.layout import Layout, Node
from harp_batch.errors import ClusterError, RunFailed
from harp_batch.records import Answer, Shard

PATIENCE = 0.25  # seconds an idle actor holds a poll back, so that an idle driver does not spin
LAST_WORDS = 10.0  # seconds that actors get to hand over what is finished when the run is stopped
KNOCK = 5.0  # seconds for a connection to a cluster's address
MAX_ATTEMPTS = 3  # of one shard
BARREN_LOSSES = MAX_ATTEMPTS + 2  # actors lost in a row, per actor, without one answer in between
OBJECT_STORE = 256 * 2**20  # bytes; only leases and replies pass through a local cluster


class Watcher(Protocol):
    """Who receives the answers of a run."""

    def answers(self, answers: Sequence[Answer]) -> None:
        """Commit ``answers``; they count when this returns."""

    def tick(self, pids: Sequence[int]) -> None:
        """Another round of the loop is over; ``pids`` are the actors that are ready."""

    def should_stop(self) -> bool:
        """Whether to end now, with what is finished."""


@contextmanager
def connect(address: str | None = None) -> Iterator[None]:
    """Be connected to Ray: to ``address``, else to the cluster this process already uses, else to one of our own.

    ``address`` is HOST:PORT, ``auto`` or ``local``. Raises ClusterError where no cluster answers there.
    """
    if address is None and ray.is_initialized():
        yield
        return
    _start(address or os.environ.get("RAY_ADDRESS") or "local")
    try:
        yield
    finally:
        ray.shutdown()


def _start(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns at length where it is unset
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    if address not in ("local", "auto"):
        _knock(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as exc:
        reason = str(exc).strip().partition("\n")[0]
        raise ClusterError(f"Ray cannot be used at {address!r} ({reason}); see `ray status`") from exc
    # log_to_driver does not cover what the raylet says of dead workers; this is the switch of Ray's own debugger.
    ray._private.worker._worker_logs_enabled = False


def _knock(address: str) -> None:
    """Raise ClusterError where nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        raise ClusterError(
            f"{address!r} is no address of a Ray cluster; it must look like HOST:6379, or be auto"
        )
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK).close()
    except (OSError, OverflowError) as exc:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({exc}); start one there with `ray start --head`, "
            "or leave the address out to use this machine alone"
        ) from exc


def nodes() -> list[Node]:
    """The resources of every live node of the connected cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def run_model(
    recipe: Recipe,
    layout: Layout,
    shards: Sequence[Shard],
    watcher: Watcher,
    max_attempts: int = MAX_ATTEMPTS,
) -> bool:
    """Have every request of ``shards`` answered by actors of one model; return whether all were.

    False means that the watcher asked to stop. Raises RunFailed where no actor can do the work.
    """
    run = _Run(recipe, layout, Dispatcher(shards, max_attempts), watcher)
    try:
        return run.loop()
    finally:
        run.crew.dismiss()


@dataclass(slots=True)
class _Member:
    """One actor, from its start to its loss."""

    name: str
    handle: Any
    poll: Any  # the reference of the reply to come
    last: Reply | None = None  # a watch over hung actors compares steps and clock with the next reply

    @property
    def ready(self) -> bool:
        return self.last is not None and self.last.ready


class _Crew:
    """The actors of one model."""

    def __init__(self, recipe: Recipe, layout: Layout) -> None:
        self._recipe = recipe
        self._actor = ray.remote(Worker).options(
            num_cpus=layout.cpus,
            num_gpus=layout.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,  # a poll waits in one thread while leases come in through others
            scheduling_strategy="SPREAD",
        )
        self._names = (f"actor-{number}" for number in itertools.count())
        self.members: dict[str, _Member] = {}
        for _ in range(layout.actors):
            self.hire()

    def hire(self) -> None:
        handle = self._actor.remote(self._recipe)
        member = _Member(next(self._names), handle, handle.poll.remote(PATIENCE))
        self.members[member.name] = member

    def drop(self, member: _Member) -> None:
        del self.members[member.name]
        ray.kill(member.handle)

    def dismiss(self) -> None:
        for member in list(self.members.values()):
            self.drop(member)

    def replies(self, everyone: bool = False) -> Iterator[tuple[_Member, Reply | RayError]]:
        """Wait for a reply (or for everyone's) and yield all there are; who replied is asked again."""
        by_poll = {member.poll: member for member in self.members.values()}
        wanted = len(by_poll) if everyone else 1
        ray.wait(list(by_poll), num_returns=wanted, timeout=LAST_WORDS if everyone else 2 * PATIENCE)
        there, _ = ray.wait(list(by_poll), num_returns=len(by_poll), timeout=0)
        for poll in there:
            yield by_poll[poll], self._open(by_poll[poll])

    def _open(self, member: _Member) -> Reply | RayError:
        try:
            member.last = ray.get(member.poll)
        except RayError as exc:
            return exc
        member.poll = member.handle.poll.remote(PATIENCE)
        return member.last


class _Run:
    """One model's way through its shards."""

    def __init__(self, recipe: Recipe, layout: Layout, dispatcher: Dispatcher, watcher: Watcher) -> None:
        self._dispatcher = dispatcher
        self._watcher = watcher
        self._slots = recipe.slots
        self._actors = layout.actors
        self._losses = 0  # in a row, without an answer in between
        self.crew = _Crew(recipe, layout)

    def loop(self) -> bool:
        while not self._dispatcher.done:
            stop = self._watcher.should_stop()
            for member, reply in self.crew.replies(everyone=stop):
                self._hear(member, reply)
            if stop:
                return self._dispatcher.done
            self._top_up()
            self._watcher.tick([m.last.pid for m in self.crew.members.values() if m.last and m.ready])
        return True

    def _hear(self, member: _Member, reply: Reply | RayError) -> None:
        if isinstance(reply, RayError):
            self._lose(member, "its process died")
            return
        self._take(reply)
        if reply.error and not reply.ready:
            raise RunFailed(f"an actor could not load the model: {reply.error}")
        if reply.error:
            self._lose(member, reply.error)

    def _take(self, reply: Reply) -> None:
        by_lease: dict[LeaseId, list[Answer]] = defaultdict(list)
        for lease, answer in reply.answers:
            by_lease[lease].append(answer)
        self._commit(by_lease)
        if reply.answers:
            self._losses = 0

    def _commit(self, by_lease: dict[LeaseId, list[Answer]]) -> None:
        """Hand over what is new, and count it only after that."""
        fresh = {
            lease: self._dispatcher.fresh(lease, map(_key, answers)) for lease, answers in by_lease.items()
        }
        new = [a for lease, answers in by_lease.items() for a in answers if _key(a) in fresh[lease]]
        if new:
            self._watcher.answers(new)
        for lease, keys in fresh.items():
            self._dispatcher.accept(lease, keys)

    def _lose(self, member: _Member, reason: str) -> None:
        self.crew.drop(member)
        self._losses += 1
        for lease in self._dispatcher.actor_lost(member.name):
            self._give_up(lease, reason)
        if self._losses > BARREN_LOSSES * self._actors:
            raise RunFailed(f"{self._losses} actors were lost in a row without one answer: {reason}")
        self.crew.hire()

    def _give_up(self, lease: Lease, reason: str) -> None:
        message = f"given up after {lease.epoch - 1} attempts: the actor was lost ({reason})"
        errors = [error_answer(lease.evaluation_id, request, message) for request in lease.requests]
        self._commit({lease.id: errors})

    def _top_up(self) -> None:
        """Lease to ready actors, in turns, until each has a full backlog and none more than its share."""
        share = min(2 * self._slots, -(-self._dispatcher.remaining // self._actors))
        hungry = [m for m in self.crew.members.values() if m.ready]
        while hungry := [m for m in hungry if self._dispatcher.load(m.name) < share]:
            leases = [(member, self._dispatcher.next_for(member.name)) for member in hungry]
            hungry = [member for member, lease in leases if lease]
            for member, lease in leases:
                if lease:
                    member.handle.assign.remote(lease)


def _key(answer: Answer) -> tuple[int, int]:
    return answer.doc_id, answer.repeat
