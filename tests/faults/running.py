"""One run of the work, from its submit to its end, through however many drivers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from tests.faults.nodes import Nodes
from tests.faults.sessions import Session
from tests.faults.watching import Rows, Tally, Watcher, by_key, tally
from tests.faults.work import Work

LANDING = 0.3  # seconds after which what a dead process had sent is committed
_PATIENCE = 120.0  # seconds without a new answer after which a run counts as stuck
_ENDING = 200.0  # seconds for the rest of a run that nobody disturbs any more
_POLL = 0.05
_STILL = 0.05  # seconds after which a process that was stopped stands still
_TO_GO = re.compile(r"(\d+) of (\d+) answers to go")


class TooShort(Exception):
    """The run is done, or all but done, before all faults have struck: the work needs more documents."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    answers: Rows
    tally: Tally
    sha256: str


class Run:
    """A run that is going on; ``driver`` is the one that owns it now."""

    def __init__(self, work: Work, url: str, actors: str, nodes: Nodes | None = None) -> None:
        self.work = work
        self.url = url
        self.nodes = nodes
        self.width = 1 if actors == "1" else 2  # actors while all is well
        self.seen: list[Rows] = []
        self._address = nodes.address if nodes else None
        self._watcher = Watcher(url)
        self._promised: list[tuple[Session, int]] = []  # drivers, and the answers there were before each
        self.driver = work.submit(url, actors, self._address)

    def actors(self) -> list[psutil.Process]:
        """The actors' processes, those included that are still loading their model."""
        where = self.nodes.workers if self.nodes else [self.driver]
        return [actor for session in where for actor in session.called("ray::Worker")]

    def decoding(self) -> list[psutil.Process]:
        """The actors that have their model and work to do, by what the driver last wrote of them."""
        pids = self._watcher.decoding()
        return [actor for actor in self.actors() if actor.pid in pids]

    def count(self) -> int:
        """How many answers are committed; waits for the database."""
        return self.wait(lambda count: True)

    def look(self) -> Rows:
        """What is committed now; it has to be there at the end, unchanged."""
        rows = by_key(self._watcher.fetch())
        self.seen.append(rows)
        return rows

    def wait_for(self, number: int) -> int:
        """Wait until so many answers are committed; return how many there are.

        Raises TooShort where the run has ended well, and AssertionError where its driver broke or is stuck.
        """
        return self.wait(lambda count: count >= number)

    def wait(self, enough: Callable[[int], bool]) -> int:
        deadline = time.monotonic() + _PATIENCE
        while (count := self._watcher.count()) is None or not enough(count):
            self._check(deadline)
            time.sleep(_POLL)
        return count

    def _check(self, deadline: float) -> None:
        if self.driver.ended() is not None:
            self.driver.require(0, timeout=0)
            raise TooShort
        assert time.monotonic() < deadline, f"nothing for {_PATIENCE:g} s\n{self.driver.said[-3000:]}"

    def is_locked(self) -> bool:
        """Whether a stopped driver keeps everybody from writing into its SQLite file."""
        time.sleep(_STILL)
        return self._watcher.is_locked()

    def take_over(self) -> None:
        """Start another driver for the run; the one before must be dead or stopped."""
        time.sleep(LANDING)
        there = self._watcher.count()
        assert there is not None, "the database does not answer"
        self.driver = self.work.resume(self.url, self._address)
        self._promised.append((self.driver, there))

    def finish(self) -> Ending:
        """Wait for the end of the run; raises AssertionError where it fails or recomputed what was there."""
        self.driver.require(0, _ENDING)
        for driver, there in self._promised:
            found = _TO_GO.search(driver.said)
            assert found, f"the driver does not say what it has to do\n{driver.said}"
            assert int(found[1]) == self.work.answers - there, f"{there} answers were there\n{driver.said}"
        fetched = self._watcher.fetch()
        self._watcher.close()
        counted = tally(self.work.answers, fetched, self.seen)
        return Ending(by_key(fetched), counted, self.work.export(self.url))
