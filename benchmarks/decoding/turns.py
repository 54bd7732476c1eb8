"""Contenders take turns; a figure is the median of a contender's rounds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


class NotRun(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Made:
    """What one turn of a contender brought."""

    units: float  # tokens, requests or rows
    hesitations: int | None = None  # None: the contender does not reframe
    seconds: float | None = None  # None: the whole turn counts


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that does a piece of work whose speed is compared."""

    name: str
    run: Callable[[], Made]
    rounds: int
    work: str  # the piece of work, for people
    unit: str = "tokens/s"


@dataclass(frozen=True, slots=True)
class Figure:
    """A contender's speed in every round that it took part in."""

    name: str
    unit: str
    work: str
    rounds: tuple[float, ...]
    hesitation_rate: float | None = None
    missing: str | None = None  # why there are no rounds

    @property
    def value(self) -> float | None:
        """The median; None where the contender did not run."""
        return statistics.median(self.rounds) if self.rounds else None


def take_turns(contenders: Sequence[Contender]) -> list[Figure]:
    """Let every contender run once a round, in order, for as many rounds as it has."""
    found = [_Tally(contender) for contender in contenders]
    for number in range(max(c.rounds for c in contenders)):
        for tally in found:
            if number < tally.contender.rounds:
                tally.take_turn(number)
    return [tally.figure() for tally in found]


class _Tally:
    """One contender's rounds so far."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._rates: list[float] = []
        self._hesitation_rate: float | None = None
        self._missing: str | None = None

    def take_turn(self, number: int) -> None:
        if self._missing:
            return
        started = time.perf_counter()
        try:
            made = self.contender.run()
        except (NotRun, torch.OutOfMemoryError) as error:
            self._missing = str(error).partition("\n")[0]
            self._rates.clear()
            _say(f"{self.contender.name}: not run: {self._missing}")
            return
        self._rates.append(made.units / (made.seconds or time.perf_counter() - started))
        if made.hesitations is not None:
            self._hesitation_rate = made.hesitations / made.units
        _say(f"round {number + 1}: {self.contender.name}: {self._rates[-1]:.4g} {self.contender.unit}")

    def figure(self) -> Figure:
        contender = self.contender
        rates = tuple(self._rates)
        return Figure(
            contender.name, contender.unit, contender.work, rates, self._hesitation_rate, self._missing
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
