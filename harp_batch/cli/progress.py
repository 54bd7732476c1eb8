"""A run's progress on stderr: live bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from harp_batch.cli.pace import Line, Pace
from harp_batch.cli.status import short_id

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from harp_batch.service.progress import Progress
    from harp_batch.store import RunSummary

SECONDS_BETWEEN_LINES = 10.0
BARS_AT_ONCE = 8


class Display(Protocol):
    """What a renderer shows; used as a context that leaves the terminal as it was."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def say(self, text: str) -> None:
        """A lasting line."""

    def phase(self, text: str) -> None:
        """What happens now."""

    def show(self, lines: list[Line]) -> None:
        """The evaluations that are not complete yet, in order."""


class ProgressReport:
    """The observer of a run: says what began, how it goes and, once, how each evaluation ended."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._pace = Pace()
        self._ended: set[int] = set()

    def started(self, run: RunSummary) -> None:
        self._display.say(
            f"run {run.name} ({short_id(run)}): {run.evaluations} evaluations, "
            f"{run.requests - run.answered} of {run.requests} answers to go"
        )

    def phase(self, text: str) -> None:
        self._display.phase(text)

    def note(self, text: str) -> None:
        self._display.say(text)

    def progress(self, progress: Progress) -> None:
        lines = self._pace.lines(progress)
        self._display.show([line for line in lines if not line.complete])
        for index, line in enumerate(lines):
            if line.complete and index not in self._ended:
                self._ended.add(index)
                self._display.say(f"done: {line}")

    def finished(self, run: RunSummary) -> None:  # noqa: ARG002 (the command itself says how it ended)
        self._display.show([])


class PlainLines:
    """For logs and pipes: what is being decoded, every ten seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._next = clock() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    phase = say

    def show(self, lines: list[Line]) -> None:
        if self._clock() < self._next:
            return
        self._next = self._clock() + SECONDS_BETWEEN_LINES
        for line in lines:
            if line.seconds_left is not None or line.tokens_per_second is not None:
                self.say(str(line))


class LiveBars:
    """For a terminal: one bar an unfinished evaluation, redrawn in place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._phase = ""
        self._lines: list[Line] = []
        self._live = Live(console=console, get_renderable=self._picture, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def phase(self, text: str) -> None:
        self._phase = text

    def show(self, lines: list[Line]) -> None:
        self._lines = lines

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        more = len(self._lines) - BARS_AT_ONCE
        below = [f"and {more} more evaluations"] if more > 0 else []
        below += [self._phase] if self._phase else []
        return Group(bars(self._lines[:BARS_AT_ONCE]), *(Text(text, style="dim") for text in below))


def bars(lines: list[Line]) -> RenderableType:
    """A grid: label, bar, done/total, facts."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for line in lines:
        grid.add_row(
            Text(line.label),
            ProgressBar(total=line.total, completed=line.done, width=16),
            Text(f"{line.done}/{line.total}"),
            Text(" · ".join(line.facts), no_wrap=True, overflow="ellipsis"),
        )
    return grid


def display() -> Display:
    """The one that suits stderr."""
    if not sys.stderr.isatty():
        return PlainLines(sys.stderr)
    from rich.console import Console

    return LiveBars(Console(stderr=True))
