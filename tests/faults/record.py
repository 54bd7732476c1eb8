"""The record of the long suite: JSON lines in a file, one a run, and the page that is made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.faults.striking import Kind

Line = dict[str, Any]

BEGIN, END = "<!-- made by `make faults`: begin -->", "<!-- made by `make faults`: end -->"
_MACHINE = ("processor", "cores", "python", "torch", "ray", "commit")


def append(record: Path, machine: Line, line: Line) -> None:
    """Add a run: the fields of ``Disturbed``, or date, seed and ``failure``."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"machine": {key: machine[key] for key in _MACHINE}}) + "\n")


def read(record: Path) -> list[Line]:
    """Every run there is."""
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def put(page: Path, lines: Sequence[Line]) -> None:
    """Replace the part of the page between its two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(lines)}\n{END}{after}", encoding="utf-8")


def markdown(lines: Sequence[Line]) -> str:
    """The record as tables."""
    went = [line for line in lines if "failure" not in line]
    failed = [line for line in lines if "failure" in line]
    parts = [_origin(lines), _table(("", "count"), _totals(went, failed)), _by_kind(went)]
    parts += [f"Seed {line['seed']} failed: {line['failure']}" for line in failed]
    return "\n\n".join(parts) + "\n"


def _origin(lines: Sequence[Line]) -> str:
    dates = sorted(line["date"] for line in lines)
    seeds = sorted({line["seed"] for line in lines})
    machines = [line["machine"] for line in lines]
    one = "; ".join(sorted({f"{m['processor']}, {m['cores']} cores, Python {m['python']}" for m in machines}))
    versions = "; ".join(sorted({f"torch {m['torch']}, Ray {m['ray']}" for m in machines}))
    commits = ", ".join(dict.fromkeys(m["commit"] for m in machines))
    return f"{dates[0]} to {dates[-1]} UTC. {one}; {versions}. Seeds {_ranges(seeds)}, at commit {commits}."


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as ``1-3, 7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, pair)) for pair in ranges)


def _totals(went: Sequence[Line], failed: Sequence[Line]) -> Iterable[tuple[str, Any]]:
    faults = [fault for line in went for fault in line["faults"]]
    kills = sum(Kind(fault["kind"]).is_kill for fault in faults)
    tokens = sum(line["tokens"] for line in went)
    again = sum(line["recomputed"] for line in went)
    yield "runs", len(went) + len(failed)
    yield "runs that failed", len(failed)
    yield "kills (SIGKILL and SIGSTOP)", kills
    yield "other faults", len(faults) - kills
    yield "recoveries", len(faults)
    yield "answers", sum(line["answers"] for line in went)
    yield "tokens", tokens
    yield "tokens computed again, at most", f"{again} ({again / tokens:.1%})" if tokens else again
    yield "answers lost", sum(line["lost"] for line in went)
    yield "answers doubled", sum(line["doubled"] for line in went)
    yield "exports with another SHA-256", sum(not line["same"] for line in went)


def _by_kind(went: Sequence[Line]) -> str:
    seconds: dict[Kind, list[float]] = {kind: [] for kind in Kind}
    for line in went:
        for fault in line["faults"]:
            seconds[Kind(fault["kind"])].append(fault["seconds"])
    rows = [
        (kind.value, len(found), f"{median(found):.1f}", f"{max(found):.1f}")
        for kind, found in seconds.items()
        if found
    ]
    return _table(("fault", "times", "seconds to recover, median", "longest"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
