"""The record of the long suite, and the page that is made from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults import record
from tests.faults.disturbing import Disturbed
from tests.faults.striking import Fault, Kind

MACHINE = {"processor": "CPU", "cores": 2, "python": "3", "torch": "2", "ray": "2.60", "commit": "abc"}


def line(seed: int, *faults: Fault, lost: int = 0, same: bool = True) -> record.Line:
    return asdict(
        Disturbed(
            date=f"2026-01-0{seed} 10:00:00",
            seed=seed,
            layout="one actor",
            database="sqlite",
            faults=faults,
            skipped=0,
            answers=100,
            lost=lost,
            doubled=0,
            tokens=1000,
            recomputed=25,
            same=same,
            seconds=60.0,
        )
    )


@pytest.fixture
def lines(tmp_path: Path) -> list[record.Line]:
    file = tmp_path / "build" / "faults.jsonl"
    kills = [Fault(Kind.ACTOR_KILLED, 10, seconds, in_flight=4) for seconds in (1.0, 9.0, 2.0)]
    record.append(file, MACHINE, line(1, *kills))
    record.append(
        file, MACHINE, line(2, Fault(Kind.DATABASE_RESTARTED, 5, 3.5, in_flight=0), lost=2, same=False)
    )
    record.append(file, MACHINE, {"date": "2026-01-04 10:00:00", "seed": 4, "failure": "it broke"})
    return record.read(file)


def test_everything_is_counted(lines: list[record.Line]) -> None:
    page = record.markdown(lines)
    for row in (
        "| runs | 3 |",
        "| runs that failed | 1 |",
        "| kills (SIGKILL and SIGSTOP) | 3 |",
        "| other faults | 1 |",
        "| recoveries | 4 |",
        "| tokens computed again, at most | 50 (2.5%) |",
        "| answers lost | 2 |",
        "| answers doubled | 0 |",
        "| exports with another SHA-256 | 1 |",
        "| actor: SIGKILL | 3 | 2.0 | 9.0 |",
        "| PostgreSQL: restart -m immediate | 1 | 3.5 | 3.5 |",
        "Seed 4 failed: it broke",
    ):
        assert row in page
    assert "Seeds 1-2, 4, at commit abc" in page


def test_only_the_marked_part_of_the_page_changes(lines: list[record.Line], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{record.BEGIN}\n{record.END}\nafter\n", encoding="utf-8")
    record.put(page, lines)
    once = page.read_text(encoding="utf-8")
    record.put(page, lines)
    assert page.read_text(encoding="utf-8") == once
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert record.markdown(lines) in once
