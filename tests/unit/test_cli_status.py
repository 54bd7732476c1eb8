"""`status RUN`: what a driver wrote down, seen from another process; on a real SQLite database."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result

from harp_batch.cli.app import app
from harp_batch.cli.standing import Standing
from harp_batch.records import RunStatus
from harp_batch.store import LEASE, Store, open_store
from tests.support.store_records import a_run, an_answer

RUN = "c0ffee0123456789"
STATE: dict[str, Any] = {
    "phase": "decoding with tiny",
    "evaluations": [
        {
            "model": "tiny",
            "task": "sums",
            "method": method,
            "total": 4,
            "done": done,
            "errors": 0,
            "scored": done,
            "correct": 1 if done else 0,
            "output_tokens": 3 * done,
            "traced_tokens": 3 * done,
            "hesitations": 2 * done,
        }
        for method, done in (("greedy", 2), ("harp", 0))
    ],
    "actors": [
        {
            "name": "actor-3",
            "state": "decoding",
            "host": "node-b",
            "pid": 4242,
            "device": "cpu",
            "requests": 2,
            "steps": 17,
        }
    ],
    "shards": {"done": 2, "queued": 4, "leased": 2, "isolated": 0},
    "losses": 3,
    "rate": 123.45,
    "buffered": 9,
    "notes": ["actor-0 was lost: its process died", "a note with \x1b[31mcolour"],
}


@pytest.fixture
def url(sqlite_url: str) -> str:
    """A database with one run of two evaluations, two of whose eight answers are there."""
    with open_store(sqlite_url) as store:
        store.create_run(a_run(id=RUN))
        store.commit([an_answer(f"{RUN}/greedy", doc_id) for doc_id in (0, 1)])
    return sqlite_url


def drive(url: str, state: dict[str, Any] = STATE, outcome: RunStatus | None = None) -> None:
    """Be the run's driver for a moment, on a host called node-a."""
    with open_store(url) as store:
        attempt = store.acquire(RUN, "node-a", 4711, stale_after=15.0)
        store.heartbeat(attempt, state, 65.0)
        if outcome:
            store.end_attempt(attempt, outcome)


def status(url: str, *arguments: str) -> Result:
    result = CliRunner().invoke(app, ["status", RUN[:6], "--db", url, *arguments])
    assert result.exit_code == 0, result.stderr
    return result


def line(result: Result, begin: str) -> str:
    """The one line that begins so, blanks squeezed."""
    (found,) = [
        text for text in result.stdout.splitlines() if text.split()[: len(begin.split())] == begin.split()
    ]
    return " ".join(found.split())


def test_a_running_run_in_full(url: str) -> None:
    drive(url)
    shown = status(url)
    assert line(shown, "nightly").split()[:3] == ["nightly", RUN[:8], "running"]
    assert "2/8" in line(shown, "nightly")
    assert line(shown, "driver:").startswith("driver: process 4711 on node-a, heard from ")
    assert line(shown, "doing:") == "doing: decoding with tiny"
    assert line(shown, "rate:") == "rate: 123.5 tokens/s"
    assert line(shown, "this") == "this model's requests: 2 done, 4 queued, 2 leased, 0 isolated"
    assert line(shown, "actors lost:") == "actors lost: 3"
    assert line(shown, "answers that wait") == "answers that wait for the database: 9"
    assert line(shown, "tiny sums greedy") == "tiny sums greedy 2/4 0 50.0% 66.7%"
    assert line(shown, "tiny sums harp") == "tiny sums harp 0/4 0 - -"
    assert line(shown, "actor-3") == "actor-3 decoding node-b 4242 cpu 2 17"
    assert line(shown, "1 node-a").startswith("1 node-a 4711 ")
    assert line(shown, "1 node-a").endswith(" - 1 min 05 s")
    assert line(shown, "actor-0") == "actor-0 was lost: its process died"
    assert shown.stderr == ""


def test_a_note_brings_no_escape_to_the_terminal(url: str) -> None:
    drive(url)
    assert "\x1b" not in status(url).stdout


def test_every_attempt_has_a_line(url: str) -> None:
    drive(url, outcome=RunStatus.INTERRUPTED)
    drive(url, outcome=RunStatus.FAILED)
    shown = status(url)
    assert " interrupted " in line(shown, "1 node-a")
    assert " failed " in line(shown, "2 node-a")
    assert line(shown, "nightly").split()[2] == "failed"


def test_a_run_that_has_ended_shows_no_actors_and_no_rate(url: str) -> None:
    drive(url, outcome=RunStatus.INTERRUPTED)
    shown = status(url)
    assert "actor-3" not in shown.stdout
    assert "tokens/s" not in shown.stdout
    assert line(shown, "tiny sums greedy") == "tiny sums greedy 2/4 0 50.0% 66.7%"


def test_counts_that_are_behind_the_answers_are_not_shown_once_the_run_has_ended(url: str) -> None:
    behind = {**STATE, "evaluations": [{**STATE["evaluations"][0], "done": 1}]}
    drive(url, behind, outcome=RunStatus.INTERRUPTED)
    assert "evaluations:" not in status(url).stdout


def test_a_run_that_nobody_drives_is_in_doubt(url: str) -> None:
    """It was created, and its driver was killed at once."""
    shown = status(url)
    assert line(shown, "nightly").split()[2] == "running?"
    assert f"`harp-batch resume {RUN[:8]} --db {url}`" in shown.stderr


def test_a_driver_that_is_silent_is_in_doubt(url: str) -> None:
    drive(url)
    with open_store(url, read_only=True) as store:
        standing = seen_after(store, 0.0)
        assert not standing.in_doubt
        assert not seen_after(store, LEASE - 1).in_doubt
        assert seen_after(store, LEASE + 1).in_doubt
        assert "heard from 16 s ago" in seen_after(store, LEASE + 1).text()


def seen_after(store: Store, seconds: float) -> Standing:
    standing = Standing.of(store.find_run(RUN), store.attempts(RUN))
    return replace(standing, now=standing.attempts[-1].heartbeat_at + timedelta(seconds=seconds))


def test_a_driver_that_has_just_begun(url: str) -> None:
    with open_store(url) as store:
        store.acquire(RUN, "node-a", 4711, stale_after=15.0)
    shown = status(url)
    assert line(shown, "nightly").split()[2] == "running"
    assert "evaluations:" not in shown.stdout


def test_the_same_as_data(url: str) -> None:
    drive(url, outcome=RunStatus.INTERRUPTED)
    drive(url)
    (record,) = json.loads(status(url, "--format", "json").stdout)
    assert (record["id"], record["status"], record["answered"], record["requests"]) == (RUN, "running", 2, 8)
    assert record["state"] == STATE
    assert record["in_doubt"] is False
    assert 0 <= record["heartbeat_age"] < LEASE
    attempts = [(a["epoch"], a["host"], a["pid"], a["outcome"], a["seconds"]) for a in record["attempts"]]
    assert attempts == [(1, "node-a", 4711, "interrupted", 65.0), (2, "node-a", 4711, None, 65.0)]
    (row,) = csv.DictReader(io.StringIO(status(url, "--format", "csv").stdout))
    assert list(row) == list(record)
    assert json.loads(row["state"]) == STATE


def test_the_list_of_runs_has_no_such_columns(url: str) -> None:
    drive(url)
    (row,) = json.loads(CliRunner().invoke(app, ["status", "--db", url, "--format", "json"]).stdout)
    assert {"state", "attempts", "in_doubt", "heartbeat_age"}.isdisjoint(row)
