"""The results table on a terminal: never shredded, whatever its width and its characters."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from typing import Any

import pytest

from harp_batch.cli.results import people_text

METRICS = {"gsm8k": ["strict-match", "flexible-extract"], "commonsense_qa": ["none"]}


def row(task: str, method: str, kind: str) -> dict[str, Any]:
    return {
        "model": "m\N{LATIN SMALL LETTER E WITH ACUTE}",
        "task": task,
        "method": method,
        "metric": "exact_match",
        "filter": kind,
        "value": 0.385,
        "ci_low": 0.339,
        "ci_high": 0.433,
        "baseline": "greedy",
        "delta": -0.14,
        "delta_ci_low": -0.181,
        "delta_ci_high": -0.099,
        "p_value": 0.01,
        "n": 1319,
        "relative_cost": 1.2,
        "relative_time": 1.33,
        "tokens_per_second": 1234.5,
        "hesitation_rate": 0.12,
        "flip_rate": 0.3,
    }


ROWS = [
    row(task, method, kind) for task in METRICS for method in ("greedy", "harp") for kind in METRICS[task]
]


def blocks(text: str) -> list[list[str]]:
    return [block.splitlines() for block in text.split("\n\n")]


@pytest.mark.parametrize("width", [None, 200])
def test_where_there_is_room_it_is_one_table(width: int | None) -> None:
    _, table = blocks(people_text(ROWS, width))
    assert len(table) == 2 + len(ROWS)


@pytest.mark.parametrize("width", [1, 40, 80, 120])
def test_a_narrow_terminal_gets_two_tables_of_whole_lines(width: int) -> None:
    _, accuracy, speed = blocks(people_text(ROWS, width))
    assert accuracy[0].split("  ")[0] == speed[0].split("  ")[0] == "task"
    assert [line.split()[:2] for line in accuracy[2:]] == [[r["task"], r["method"]] for r in ROWS]
    assert accuracy[2].split()[2:] == [
        "exact_match",
        "(strict-match)",
        "38.5%",
        "[33.9,",
        "43.3]",
        "baseline",
        "0.010",
        "1,319",
    ]
    assert [line.split() for line in speed[2:]] == [
        [task, method, "1.20x", "1.33x", "1,234.5", "12.0%", "30.0%"]
        for task in METRICS
        for method in ("greedy", "harp")
    ]
    assert max(map(len, speed)) <= 80


def test_the_two_tables_of_gsm8k_alone_take_at_most_100_columns() -> None:
    only = [r for r in ROWS if r["task"] == "gsm8k"]
    assert max(map(len, people_text(only, 80).splitlines())) <= 100


SHOW = """
import json, sys
from harp_batch.cli import app, output, results
import click
app.app.add_command(click.Command("show", callback=lambda: output.write(
    results.people_text(json.loads(sys.stdin.read()), output.terminal_width()))))
sys.argv = ["harp-batch", "show"]
app.main()
"""


def show(**options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", SHOW],
        input=json.dumps(ROWS).encode(),
        env=environment,
        stderr=subprocess.PIPE,
        timeout=60,
        **options,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_stdout_without_unicode_gets_an_ascii_table(encoding: str) -> None:
    done = show(stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    name, table = blocks(done.stdout.decode(encoding))
    assert name == ["m\\xe9" if encoding == "ascii" else "m\xe9"]
    assert set(table[1]) == {"-"}


def test_json_stays_json_on_a_stdout_without_unicode() -> None:
    code = "from harp_batch.cli.output import write_rows; write_rows(['t'], [['\\xe9\\u2014']], 'json')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, timeout=60, check=True
    )
    assert json.loads(done.stdout) == [{"t": "\xe9\u2014"}]


def test_a_terminal_is_asked_for_its_width() -> None:
    """A real terminal of 80 columns gets two tables."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with os.fdopen(slave, "w") as terminal:
        done = show(stdout=terminal, env={"COLUMNS": "", "PYTHONIOENCODING": "utf-8"})
    shown = os.read(master, 1 << 16).decode().replace("\r\n", "\n")
    os.close(master)
    assert done.returncode == 0
    assert [block[0].split()[0] for block in blocks(shown)] == ["m\xe9", "task", "task"]
