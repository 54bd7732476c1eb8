"""How one run stands, as its driver last wrote it down: what `status RUN` shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from harp_batch.cli import numbers
from harp_batch.cli.output import UNDEFINED, Rows, cell, text_table
from harp_batch.place import host_name
from harp_batch.records import RunStatus

if TYPE_CHECKING:
    from harp_batch.store import Attempt, RunSummary

Table = tuple[str, list[str], Rows]  # a heading, columns, rows


@dataclass(frozen=True, slots=True)
class Standing:
    """A run with its attempts (the driver's sessions), looked at ``now``."""

    run: RunSummary
    attempts: Sequence[Attempt]  # oldest first
    now: datetime  # aware; of this machine, while heartbeats have the database's clock

    @classmethod
    def of(cls, run: RunSummary, attempts: Sequence[Attempt]) -> Standing:
        """The run as it is at this moment."""
        return cls(run, attempts, datetime.now(UTC))

    @property
    def silence(self) -> float | None:
        """Seconds since the driver was last heard from; None where there is none."""
        if not self.attempts or self.attempts[-1].ended_at is not None:
            return None
        return max(0.0, (self.now - self.attempts[-1].heartbeat_at).total_seconds())

    @property
    def in_doubt(self) -> bool:
        """Whether the run counts as running and nobody seems to drive it."""
        from harp_batch.store import LEASE

        running = self.run.status is RunStatus.RUNNING
        return running and (self.silence is None or self.silence > LEASE)

    @property
    def state(self) -> dict[str, Any]:
        """What the newest driver last wrote of the run; empty where it has not yet."""
        return self.attempts[-1].state or {} if self.attempts else {}

    def record(self) -> dict[str, Any]:
        """All of it as data; ``state`` is the newest attempt's alone."""
        attempts = [asdict(attempt) for attempt in self.attempts]
        for attempt in attempts:
            del attempt["state"], attempt["run_id"]
        return {
            **asdict(self.run),
            "heartbeat_age": self.silence,
            "in_doubt": self.in_doubt,
            "state": self.state or None,
            "attempts": attempts,
        }

    def text(self) -> str:
        """What people see below the run's own line; empty where nobody has driven it."""
        paragraphs = [
            "\n".join(self._facts()),
            *(_paragraph(*table) for table in self._tables()),
            self._notes(),
        ]
        return "\n\n".join(filter(None, paragraphs))

    def _facts(self) -> Iterator[str]:
        if self.run.status is not RunStatus.RUNNING or not self.attempts:
            return
        state, last = self.state, self.attempts[-1]
        heard = f"heard from {numbers.duration(self.silence)} ago"
        yield f"driver: process {last.pid} on {cell(host_name(last.host))}, {heard}"
        if state.get("phase"):
            yield f"doing: {cell(state['phase'])}"
        if state.get("rate") is not None:
            yield f"rate: {numbers.rate(state['rate'])} tokens/s"
        if state.get("shards"):
            yield "this model's requests: " + ", ".join(
                f"{count} {cell(where)}" for where, count in state["shards"].items()
            )
        if state.get("losses"):
            yield f"actors lost: {state['losses']}"
        if state.get("buffered"):
            yield f"answers that wait for the database: {state['buffered']}"

    def _tables(self) -> Iterator[Table]:
        evaluations = self.state.get("evaluations", [])
        # A driver that was killed may not have written down its last answers.
        if self.run.status is RunStatus.RUNNING or sum(e["done"] for e in evaluations) == self.run.answered:
            columns = ["model", "task", "method", "answers", "errors", "right", "hesitates"]
            yield "evaluations", columns, [_evaluation(e) for e in evaluations]
        if self.run.status is RunStatus.RUNNING:
            columns = ["actor", "state", "host", "process", "device", "requests", "steps"]
            yield "actors", columns, [_actor(a) for a in self.state.get("actors", [])]
        columns = ["attempt", "host", "process", "began", "took", "ended", "decoding"]
        yield "attempts", columns, [_attempt(a) for a in self.attempts]

    def _notes(self) -> str:
        notes = self.state.get("notes", [])
        return "\n".join(["notes:", *(f"  {cell(note)}" for note in notes)]) if notes else ""


def _paragraph(heading: str, columns: list[str], rows: Rows) -> str:
    return f"{heading}:\n{text_table(columns, rows)}" if rows else ""


def _evaluation(e: dict[str, Any]) -> list[Any]:
    return [
        e["model"],
        e["task"],
        e["method"],
        f"{e['done']}/{e['total']}",
        e["errors"],
        _share(e["correct"], e["scored"]),
        _share(e["hesitations"], e["traced_tokens"]),
    ]


def _share(part: int, whole: int) -> str:
    return numbers.percent(part / whole) if whole else UNDEFINED


def _actor(a: dict[str, Any]) -> list[Any]:
    return [a["name"], a["state"], a["host"], a["pid"], a["device"], a["requests"], a["steps"]]


def _attempt(a: Attempt) -> list[Any]:
    took = ((a.ended_at or a.heartbeat_at) - a.started_at).total_seconds()
    return [
        a.epoch,
        host_name(a.host),
        a.pid,
        f"{a.started_at.astimezone():%Y-%m-%d %H:%M}",
        numbers.duration(took),
        a.outcome,
        numbers.duration(a.seconds),
    ]
