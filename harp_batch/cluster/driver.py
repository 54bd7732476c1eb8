"""Ray: connections to clusters, and actors as the loop wants them.

Ray restarts nothing and retries nothing: a lost actor's unfinished requests go back to the dispatcher, and a
fresh actor takes its place.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from harp_batch.cluster.actor import Recipe, Reply, Worker
from harp_batch.cluster.dispatcher import Dispatcher, Lease
from harp_batch.cluster.layout import Group, Node, Wishes, lay_out
from harp_batch.cluster.loop import Hand, Loop, Lost, Watcher
from harp_batch.errors import ClusterError
from harp_batch.place import here
from harp_batch.records import Shard

KNOCK = 5.0  # seconds for a connection to a cluster's address
OBJECT_STORE = 256 * 2**20  # bytes; only leases and replies pass through a local cluster
SURVEY = 2.0  # seconds between two looks at the cluster's nodes


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
    except Exception as exc:  # Ray raises plain ones, too: for a node that does not start in time
        reason = str(exc).strip().partition("\n")[0]
        raise ClusterError(
            f"Ray cannot be used at {address!r} ({reason}); see `ray status`, and where the cluster wants a token, "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH must name the same one here"
        ) from exc
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
    wishes: Wishes,
    shards: Sequence[Shard],
    watcher: Watcher,
    hang_timeout: float,
) -> bool:
    """Have every request of ``shards`` answered by actors of one model; return whether all were.

    False means that the watcher asked to stop. Raises RunFailed where no actor can do the work.
    """
    crew = RayCrew(recipe, wishes)
    loop = Loop(
        Dispatcher(shards), crew, watcher, _Monotonic(), slots=recipe.slots, hang_timeout=hang_timeout
    )
    try:
        return loop.run()
    finally:
        crew.dismiss()


class _Monotonic:
    """The machine's clock."""

    now = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)


@dataclass(slots=True)
class _Member:
    group: int  # its place in the layout
    handle: Any
    poll: Any  # the reference of the reply to come
    last: Reply | None = None
    dead: bool = False  # its process is gone, and the number may be another's by now


class RayCrew:
    """The Ray actors of one model; see `loop.Crew`."""

    def __init__(self, recipe: Recipe, wishes: Wishes) -> None:
        self._recipe = recipe
        self._wishes = wishes
        self._groups = lay_out(nodes(), wishes)
        self._surveyed = time.monotonic()
        self._names = (f"actor-{number}" for number in itertools.count())
        self._members: dict[str, _Member] = {}

    def hire(self) -> Hand | None:
        """Start one actor of the first group that lacks one."""
        self._survey()
        there = Counter(member.group for member in self._members.values())
        for place, group in enumerate(self._groups):
            if there[place] < group.actors:
                return self._start(place, group)
        return None

    def _survey(self) -> None:
        """Where the number of actors follows the cluster, follow it: nodes join and leave."""
        if not self._wishes.elastic or time.monotonic() - self._surveyed < SURVEY:
            return
        self._surveyed = time.monotonic()
        there = nodes()
        try:
            wanted = {group.device: group.actors for group in lay_out(there, self._wishes)}
        except ClusterError:  # the nodes with GPUs are gone, or all of them
            wanted = {"cpu": self._wishes.cpu_actors} if there else {}
        self._groups = [replace(group, actors=wanted.get(group.device, 0)) for group in self._groups]

    def _start(self, place: int, group: Group) -> Hand:
        actor = ray.remote(Worker).options(
            num_cpus=group.cpus,
            num_gpus=group.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,  # a poll waits in one thread while leases come in through others
            scheduling_strategy="SPREAD",
        )
        handle = actor.remote(self._recipe, group.device, group.threads)
        hand = Hand(next(self._names), group.device)
        self._members[hand.name] = _Member(place, handle, handle.poll.remote(0.0))
        return hand

    def drop(self, name: str) -> None:
        """Kill the actor. One of this machine is killed by its process, too: a stopped process does not hear Ray."""
        member = self._members.pop(name)
        ray.kill(member.handle)
        if member.last is not None and not member.dead and member.last.place == here():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(member.last.pid, signal.SIGKILL)

    def dismiss(self) -> None:
        """Kill every actor."""
        for name in list(self._members):
            self.drop(name)

    def assign(self, name: str, lease: Lease) -> None:
        """Queue a lease at the actor."""
        self._members[name].handle.assign.remote(lease)

    def replies(self, patience: float, everyone: bool = False) -> Iterator[tuple[str, Reply | Lost]]:
        """Who has replied is asked again at once, and holds its reply back for up to ``patience`` seconds."""
        by_poll = {member.poll: name for name, member in self._members.items()}
        if not by_poll:
            time.sleep(0 if everyone else patience)
            return
        heard = [m for m in self._members.values() if m.last is not None]
        wanted = max(len(heard), 1) if everyone else 1
        ray.wait(list(by_poll), num_returns=wanted, timeout=patience if everyone else 2 * patience)
        there, _ = ray.wait(list(by_poll), num_returns=len(by_poll), timeout=0)
        for poll in there:
            yield by_poll[poll], self._open(self._members[by_poll[poll]], patience)

    def _open(self, member: _Member, patience: float) -> Reply | Lost:
        try:
            reply: Reply = ray.get(member.poll)
        except RayError as exc:
            member.dead = True
            return _lost(exc)
        member.last = reply
        member.poll = member.handle.poll.remote(patience)
        return reply

    def has_room(self) -> bool:
        """Whether the cluster has what one more actor of any group needs."""
        free = ray.available_resources()
        return any(free.get("CPU", 0) >= g.cpus and free.get("GPU", 0) >= g.gpus for g in self._groups)


def _lost(exc: RayError) -> Lost:
    """What Ray says of an actor that is gone, in one sentence."""
    text = str(exc)
    if isinstance(exc, RayActorError) and (exc.preempted or "node has died" in text):
        return Lost("its node is gone", blameless=True)
    if isinstance(exc, RayActorError) and exc.actor_init_failed:
        return Lost(text.strip().splitlines()[-1], blameless=True, never_started=True)
    return Lost("its process died")
