"""The long fault suite: `python -m tests.faults --runs 20 --kills 200`, or `make faults`."""

from __future__ import annotations

import argparse
import sys
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from math import ceil
from pathlib import Path

from benchmarks.decoding.machine import facts
from tests.faults import record
from tests.faults.disturbing import Plan, disturb, draw, undisturbed
from tests.faults.work import Work, prepared

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "build" / "faults.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
DOCUMENTS = 800  # of the task that is generated: enough for some ten faults


def main() -> int:
    """Run, append to the record, write the page; 1 where anything was lost, doubled, different or broke."""
    asked = _arguments()
    machine = facts("cpu")
    before = len(record.read(RECORD)) if RECORD.exists() else 0
    with prepared(DOCUMENTS) as work:
        print(f"seed {asked.seed}, {asked.runs} runs, {asked.kills} kills", flush=True)
        sha256 = undisturbed(work).sha256
        work.sessions.end()
        print(f"undisturbed: {sha256}", flush=True)
        _run_all(work, sha256, asked, machine)
    lines = record.read(RECORD)
    record.put(PAGE, lines)
    return int(any(_bad(line) for line in lines[before:]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many at least (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=200, help="of all runs together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each has the next one")
    return parser.parse_args()


def _run_all(work: Work, sha256: str, asked: argparse.Namespace, machine: record.Line) -> None:
    """Run until there were enough runs and kills; runs that end early, or fail, are made up for by others."""
    kills, each = 0, ceil(asked.kills / asked.runs)
    for number in range(2 * asked.runs):
        if number >= asked.runs and kills >= asked.kills:
            return
        line = _run(work, draw(asked.seed + number, each), sha256)
        record.append(RECORD, machine, line)
        kills += sum(fault["kind"].is_kill for fault in line.get("faults", ()))


def _run(work: Work, plan: Plan, sha256: str) -> record.Line:
    print(f"seed {plan.seed}: {plan.layout}, {plan.database}", flush=True)
    try:
        line = asdict(disturb(work, plan, sha256))
    except AssertionError as error:
        traceback.print_exc()
        work.sessions.end()
        first = next(iter(str(error).splitlines()), "no message")
        return {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}", "seed": plan.seed, "failure": first}
    found = {name: line[name] for name in ("answers", "lost", "doubled", "skipped", "same", "seconds")}
    print(f"  {found}", flush=True)
    return line


def _bad(line: record.Line) -> bool:
    return "failure" in line or line["lost"] > 0 or line["doubled"] > 0 or not line["same"]


if __name__ == "__main__":
    sys.exit(main())
