"""The work that is disturbed: a tiny model, a job of so many questions, and the programs to run it with."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from secrets import token_hex
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

from tests.faults.postgres import Postgres, postgres
from tests.faults.sessions import Session, Sessions, sessions
from tests.support.tiny_files import save_tiny_llama

HANG_SECONDS = 5  # until an actor that takes no step is given up
SLOTS = 4
SHARD_SIZE = 4
_CHOICES = 24  # documents of the second task
_THETA = 7.92  # bits; the tiny model's entropies are close together, and half of its tokens are above
_CONTEXT = 200  # positions: room for every question and its answer
_PROGRAM = Path(sys.executable).with_name("harp-batch")
_JOB = """
name: faults
models: [{{ref: {model}, chat_template: false}}]
tasks: [{{task: demo_choice, limit: {choices}}}, demo_arithmetic]
methods: [harp: {{theta: {theta}, mask: step}}, greedy]
baseline: greedy
generation: {{max_new_tokens: 32}}
cluster: {{slots: {slots}, shard_size: {shard_size}, hang_timeout: {hang}}}
"""
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas")
_THINGS = ("apples", "books", "cups", "eggs", "maps", "pens", "shells", "stamps")


@dataclass(frozen=True, slots=True)
class Work:
    """A folder with model, data and job; ``submit`` starts a new run, ``resume`` goes on with the newest."""

    folder: Path
    sessions: Sessions
    postgres: Postgres
    answers: int  # that make a run complete

    def submit(self, url: str, actors: str, address: str | None) -> Session:
        """Start a driver with a new run; ``actors`` as in the job's ``cluster.actors``."""
        how_many = ("--set", f"cluster.actors={actors}")
        return self._harp_batch("submit", "job.yaml", *how_many, *_at(address), "--db", url)

    def resume(self, url: str, address: str | None) -> Session:
        """Start a driver that goes on with the newest run."""
        return self._harp_batch("resume", "latest", *_at(address), "--db", url)

    def export(self, url: str) -> str:
        """SHA-256 of the newest run's canonical export, as ``harp-batch export`` says it."""
        out = self.folder / "answers.jsonl"
        exporting = self._harp_batch("export", "latest", "--canonical", "-o", str(out), "--db", url)
        exporting.require(0, timeout=60)
        return exporting.said.split()[0]

    def _harp_batch(self, *arguments: str) -> Session:
        data = ("--data-dir", "data") if arguments[0] in ("submit", "resume") else ()
        return self.sessions.start(_PROGRAM, *arguments, *data)


def _at(address: str | None) -> tuple[str, ...]:
    return ("--address", address) if address else ()


@contextmanager
def prepared(documents: int) -> Iterator[Work]:
    """A folder with everything, a PostgreSQL server, and no process of either left behind, even on SIGTERM."""
    # Not in pytest's folder: Ray's sockets need short paths, and PostgreSQL's user must be able to get there.
    with _terminable(), TemporaryDirectory(prefix="hbf-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _write(folder, documents)
        with postgres(folder) as server, sessions(folder, _environment(folder)) as started:
            yield Work(folder, started, server, answers=2 * (documents + _CHOICES))


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM leave the block as an exception, so that everything is ended; Python would just die."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(folder: Path, documents: int) -> None:
    save_tiny_llama(folder / "model", context=_CONTEXT)
    job = _JOB.format(
        model=folder / "model",
        choices=_CHOICES,
        theta=_THETA,
        slots=SLOTS,
        shard_size=SHARD_SIZE,
        hang=HANG_SECONDS,
    )
    (folder / "job.yaml").write_text(job, encoding="utf-8")
    data = folder / "data" / "demo_arithmetic"
    data.mkdir(parents=True)
    lines = [json.dumps(_question(Random(number))) for number in range(documents)]
    (data / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _question(rng: Random) -> dict[str, str | int]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    had, bought = rng.randint(1, 99), rng.randint(1, 99)
    text = f"{name} has {had} {thing} and buys {bought}. How many {thing}?"
    return {"question": text, "expression": f"{had} + {bought}", "answer": had + bought}


def _environment(folder: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return inherited | {
        "HF_HUB_OFFLINE": "1",
        # Left to itself, `ray start` looks for a token of the user's: a head uses it, workers do not.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token_hex(32),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
