"""Programs that the suite starts, with everything that they start: found, signalled and ended.

Each program leads a session of its own. Ray gives its processes groups of their own but no sessions, so that a
session holds them all, also when the one that started them is gone. Nothing outside these sessions is touched.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import psutil

_ENDING = 20.0  # seconds until what was killed must be gone
_TAIL = 3000  # characters of a program's output that a failure shows


class Session:
    """One program and all of its offspring."""

    def __init__(
        self, command: Sequence[str | Path], folder: Path, env: Mapping[str, str], log: Path
    ) -> None:
        self.command = " ".join([Path(command[0]).name, *map(str, command[1:2])])  # as people know it
        self._log = log
        with log.open("wb") as file:
            self._program = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def leader(self) -> psutil.Process:
        """The program itself; raises psutil.NoSuchProcess where it is gone."""
        return psutil.Process(self._program.pid)

    @property
    def said(self) -> str:
        """What the session has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def last(self) -> str:
        """The last line that it has written."""
        return self.said.rstrip().rpartition("\n")[2]

    def ended(self) -> int | None:
        """The program's exit code; None while it runs."""
        return self._program.poll()

    def wait(self, timeout: float) -> int:
        """The program's exit code; raises AssertionError, with what it said, where it does not end in time."""
        try:
            return self._program.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.command} runs for over {timeout:g} s\n{self.said[-_TAIL:]}"
            ) from None

    def require(self, code: int, timeout: float) -> None:
        """Wait for the end and raise AssertionError where it is not with ``code``."""
        found = self.wait(timeout)
        assert found == code, (
            f"`{self.command}` ended with {found}, not {code}: {self.last}\n{self.said[-_TAIL:]}"
        )

    def members(self) -> list[psutil.Process]:
        """Every living process of the session."""
        return list(self._living())

    def called(self, title: str) -> list[psutil.Process]:
        """The members whose title (what ``ps`` shows) begins so, in the order of their ids."""
        return [process for process in self._living() if _title(process).startswith(title)]

    def end(self) -> None:
        """Kill every member; raises AssertionError where one does not go."""
        deadline = time.monotonic() + _ENDING
        while members := self.members():
            assert time.monotonic() < deadline, f"{members} of {self.command} do not end"
            for process in members:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._program.poll()
            time.sleep(0.05)

    def _living(self) -> Iterator[psutil.Process]:
        for pid in psutil.pids():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(pid) == self._program.pid:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        yield process


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


class Sessions:
    """All sessions of a suite; the newest are ended first."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder = folder
        self._env = env
        self._numbers = count()
        self._started: list[Session] = []

    def start(self, *command: str | Path) -> Session:
        """Start a program in the suite's folder and environment."""
        log = self._folder / f"{next(self._numbers):04}-{Path(command[0]).name}.log"
        session = Session(command, self._folder, self._env, log)
        self._started.append(session)
        return session

    def end(self) -> None:
        """End every session, also where one of them does not go."""
        stubborn = []
        while self._started:
            try:
                self._started.pop().end()
            except AssertionError as error:
                stubborn.append(str(error))
        assert not stubborn, stubborn


@contextmanager
def sessions(folder: Path, env: Mapping[str, str]) -> Iterator[Sessions]:
    """Sessions that are ended when the block is left, however it is left."""
    started = Sessions(folder, env)
    try:
        yield started
    finally:
        started.end()
