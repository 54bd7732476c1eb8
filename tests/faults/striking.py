"""The faults: each strikes a run once, and the run has to get over it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from random import Random

import psutil

from tests.faults.running import LANDING, Run, TooShort
from tests.faults.sessions import Session
from tests.faults.work import HANG_SECONDS, SHARD_SIZE, SLOTS

_HELD = 2 * SLOTS + SHARD_SIZE  # answers that an actor can hold
_DITHER = 0.5  # seconds at most that a fault is put off after that
_NOTICING = 2 * HANG_SECONDS + 10.0  # seconds until a hung actor must be gone
_GRACE = 10.0  # seconds that a driver has to stop on SIGINT
_WAKING = 60.0  # seconds until a driver that was given up must end
_HIRING = 60.0  # seconds until there must be an actor to strike


class Kind(StrEnum):
    """What can happen."""

    ACTOR_KILLED = "actor: SIGKILL"
    ACTOR_STOPPED = "actor: SIGSTOP"
    RAYLET_KILLED = "raylet of a worker node: SIGKILL"
    DRIVER_KILLED = "driver: SIGKILL"
    DRIVER_STOPPED = "driver: SIGSTOP until another has taken over"
    DRIVER_INTERRUPTED = "driver: SIGINT"
    DATABASE_RESTARTED = "PostgreSQL: restart -m immediate"
    DATABASE_AWAY = "PostgreSQL: 5 s away"
    DATABASE_LONG_AWAY = "PostgreSQL: 60 s away"

    @property
    def is_kill(self) -> bool:
        """Whether it is a SIGKILL or SIGSTOP."""
        return self.endswith("SIGKILL") or "SIGSTOP" in self

    @property
    def is_of_database(self) -> bool:
        """Whether it needs PostgreSQL, and leaves all processes alone."""
        return self.startswith("PostgreSQL")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault as it went."""

    kind: Kind
    answered: int  # answers that were committed when it struck
    seconds: float  # from the blow until an answer was committed that had not been finished before it
    in_flight: int  # answers at most that were being decoded and had to be begun again: one a slot of the actors lost


@dataclass(frozen=True, slots=True)
class _Blow:
    actors: int = 0  # lost by it
    afterwards: Callable[[], None] = lambda: None  # what must be true once the run has recovered


def strike(run: Run, kind: Kind, rng: Random) -> Fault:
    """Let ``kind`` strike at a random moment, wait for the run's recovery and check what must follow.

    Raises TooShort where too little is left to be done.
    """
    apart = _HELD * run.width  # so that no request is in flight at fault after fault
    run.wait_for(run.count() + apart)
    time.sleep(rng.uniform(0, _DITHER))
    before = len(run.look())
    if run.work.answers - before < apart:
        raise TooShort
    began = time.monotonic()
    blow = _BLOWS[kind](run, rng)
    if not kind.is_of_database:
        time.sleep(LANDING)
        before = run.count()
    run.wait_for(before + 1)
    seconds = time.monotonic() - began
    blow.afterwards()
    return Fault(kind, before, round(seconds, 2), SLOTS * blow.actors)


def _kill_actor(run: Run, rng: Random) -> _Blow:
    _one_of(run.actors, rng, psutil.Process.kill)
    return _Blow(actors=1)


def _stop_actor(run: Run, rng: Random) -> _Blow:
    # One that has its model: loading may take minutes, and a driver cannot tell it from standing still.
    actor = _one_of(run.decoding, rng, psutil.Process.suspend)
    return _Blow(actors=1, afterwards=lambda: _require_gone(actor))


def _require_gone(actor: psutil.Process) -> None:
    try:
        actor.wait(_NOTICING)
    except psutil.TimeoutExpired:
        raise AssertionError(f"{actor} hangs and was not killed") from None


def _one_of(
    actors: Callable[[], list[psutil.Process]], rng: Random, blow: Callable[[psutil.Process], None]
) -> psutil.Process:
    """Strike one of the actors; waits until there is one."""
    deadline = time.monotonic() + _HIRING
    while time.monotonic() < deadline:
        for actor in rng.sample(found := actors(), len(found)):
            with suppress(psutil.NoSuchProcess):  # it ended between the look and the blow
                blow(actor)
                return actor
        time.sleep(0.1)
    raise AssertionError(f"there has been no actor for {_HIRING:g} s")


def _kill_raylet(run: Run, rng: Random) -> _Blow:
    assert run.nodes, "raylets are killed where there are several"
    return _Blow(actors=run.nodes.lose(rng))


def _kill_driver(run: Run, rng: Random) -> _Blow:
    actors = len(run.actors())
    run.driver.leader.kill()
    run.driver.require(-signal.SIGKILL, _GRACE)
    run.take_over()
    return _Blow(actors)


def _interrupt_driver(run: Run, rng: Random) -> _Blow:
    actors = len(run.actors())
    run.driver.leader.send_signal(signal.SIGINT)
    run.driver.require(130, _GRACE)
    run.take_over()
    return _Blow(actors)


def _stop_driver(run: Run, rng: Random) -> _Blow:
    actors, zombie = len(run.actors()), run.driver
    zombie.leader.suspend()
    while (
        run.is_locked()
    ):  # in the middle of a SQLite transaction: the file is its own until it goes on or dies
        zombie.leader.resume()
        time.sleep(rng.uniform(0, 0.1))
        zombie.leader.suspend()
    run.take_over()  # once the lease has passed, for which `resume` waits
    return _Blow(actors, afterwards=lambda: _wake(zombie))


def _wake(zombie: Session) -> None:
    """Let a driver go on that has lost its run: it must say so in a sentence and end."""
    zombie.leader.resume()
    zombie.require(3, _WAKING)
    assert zombie.last.startswith("Error: "), zombie.said
    assert "Traceback" not in zombie.said, zombie.said


def _restart_database(run: Run, rng: Random) -> _Blow:
    run.work.postgres.restart()
    return _Blow()


def _take_database_away(seconds: float) -> Callable[[Run, Random], _Blow]:
    def take_away(run: Run, rng: Random) -> _Blow:
        run.work.postgres.be_away(seconds)
        return _Blow()

    return take_away


_BLOWS: dict[Kind, Callable[[Run, Random], _Blow]] = {
    Kind.ACTOR_KILLED: _kill_actor,
    Kind.ACTOR_STOPPED: _stop_actor,
    Kind.RAYLET_KILLED: _kill_raylet,
    Kind.DRIVER_KILLED: _kill_driver,
    Kind.DRIVER_STOPPED: _stop_driver,
    Kind.DRIVER_INTERRUPTED: _interrupt_driver,
    Kind.DATABASE_RESTARTED: _restart_database,
    Kind.DATABASE_AWAY: _take_database_away(5.0),
    Kind.DATABASE_LONG_AWAY: _take_database_away(60.0),
}
