"""The store's benchmark: all of it once, small, on both back ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import store
from benchmarks.storing import workload
from benchmarks.storing.databases import Postgresql, Sqlite
from benchmarks.storing.ingest import Sizes


def test_the_workload_is_the_same_every_time_and_like_real_traces() -> None:
    run = workload.a_run(40)
    answers = workload.answers(run, 200)
    assert answers == workload.answers(run, 200)
    assert len({(a.evaluation_id, a.doc_id) for a in answers}) == len(answers) == 40
    traces = [a.trace for a in answers if a.evaluation_id == "harp"]
    tokens = sum(map(len, traces))
    assert tokens == 20 * 200
    assert 0.4 < sum(sum(t.hesitated) for t in traces) / tokens < 0.6
    changed = sum(a != b for t in traces for a, b in zip(t.token_ids, t.vanilla_token_ids, strict=True))
    assert 0.05 < changed / tokens < 0.15
    assert not any(any(a.trace.hesitated) for a in answers if a.evaluation_id == "greedy")


@pytest.mark.parametrize("kind", [Sqlite, Postgresql])
def test_what_is_weighed_are_the_answers(kind: type[Sqlite | Postgresql], tmp_path: Path) -> None:
    """More of them weigh more, at about the same bytes a token."""
    from benchmarks.storing.ingest import measure

    databases = kind(tmp_path)
    try:
        few, many = (measure(databases, Sizes(count, 200, (16,), 1)) for count in (64, 192))
    finally:
        databases.close()
    weights = [{f.unit: f.value for f in part.figures}["bytes/token"] for part in (few, many)]
    assert weights[0] == pytest.approx(weights[1], rel=0.25)
    assert 10 < weights[1] < 40


def test_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "QUICK", Sizes(20, 10, (3, 8), 2))
    files = tmp_path / "found.json", tmp_path / "found.md"
    folder = tmp_path / "databases"
    folder.mkdir()
    store.main(
        [
            "--quick",
            "--only",
            "sqlite",
            "--folder",
            str(folder),
            "--json",
            str(files[0]),
            "--markdown",
            str(files[1]),
        ]
    )
    shown = capsys.readouterr().out
    assert "The goals are for the whole workload" in shown
    assert "SQLite, 8 answers a transaction: thousand tokens/s" in shown
    assert "fsync of 4 KiB" in shown
    (part,) = json.loads(files[0].read_text())["parts"]
    assert [len(figure["rounds"]) for figure in part["figures"]] == [2] * 6
    assert all(value > 0 for figure in part["figures"] for value in figure["rounds"])
    assert "| SQLite, 3 answers a transaction: bytes/token |" in files[1].read_text()
    assert list(folder.iterdir()) == []
