"""The commands on a real SQLite database, without a model."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from harp_batch.cli.app import app
from harp_batch.cli.running import ending
from harp_batch.records import (
    Answer,
    Evaluation,
    FinishReason,
    MetricValue,
    Request,
    RequestKind,
    RunStatus,
    TokenTrace,
)
from harp_batch.store import VIEWS, ModelRecord, RunRecord, RunSummary, TaskRecord, open_store
from tests.support.store_records import end_run

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def request(doc_id: int) -> Request:
    return Request("t", doc_id, 0, RequestKind.GENERATE, f"{doc_id}?", (1, 2), stop=("\n",), max_new_tokens=4)


def evaluation(run_id: str, method: str) -> Evaluation:
    return Evaluation(f"{run_id}-{method}", run_id, "m", "t", method, {"kind": method}, method == "greedy", 2)


def record(run_id: str, name: str = "demo") -> RunRecord:
    return RunRecord(
        id=run_id,
        name=name,
        status=RunStatus.RUNNING,
        created_at=NOW,
        job_yaml="name: demo\n",
        seed=0,
        versions={},
        models=(ModelRecord("m", None, "float32", True, "0" * 64, 135),),
        tasks=(TaskRecord("m", "t", "1.0", 0, (request(0), request(1))),),
        evaluations=(evaluation(run_id, "greedy"), evaluation(run_id, "harp")),
    )


def answer(method: str, doc_id: int, *, hesitated: bool = False, correct: bool = True) -> Answer:
    trace = TokenTrace((5, 6), (0.5, 1.5), (False, hesitated), (5, 6), (False, False))
    return Answer(
        f"aaa1-{method}",
        doc_id,
        0,
        FinishReason.STOP,
        text="a\x1b[31mb\nc",
        trace=trace,
        prompt_tokens=2,
        forward_tokens=3 + hesitated,
        seconds=0.5,
        scores={"acc,none": float(correct)},
        correct=correct,
    )


@pytest.fixture
def db(tmp_path: Path) -> str:
    """A finished run aaa1 and a begun run bbb2."""
    url = f"sqlite:///{tmp_path}/runs.db"
    with open_store(url, create=True) as store:
        store.create_run(record("aaa1"))
        store.commit([answer("greedy", n) for n in (0, 1)])
        store.commit([answer("harp", n, hesitated=True, correct=n == 0) for n in (0, 1)])
        store.save_metrics(
            "aaa1",
            [
                MetricValue("aaa1-greedy", "acc", "none", 1.0, 0.0, 0.342, 1.0, 2, baseline="greedy"),
                MetricValue(
                    "aaa1-harp", "acc", "none", 0.5, 0.5, 0.095, 0.905, 2, "greedy", -0.5, -1.0, 0.0, None
                ),
            ],
        )
        end_run(store, "aaa1", RunStatus.DONE)
        store.create_run(record("bbb2", name="other"))
    return url


def invoke(*arguments: str, db: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--db", db])


def test_results_for_people(db: str) -> None:
    result = invoke("results", "aaa", db=db)
    greedy, harp = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "m"
    assert greedy[:7] == ["t", "greedy", "acc", "100.0%", "[34.2,", "100.0]", "baseline"]
    assert harp[:9] == ["t", "harp", "acc", "50.0%", "[9.5,", "90.5]", "-50.0", "[-100.0,", "0.0]"]
    assert harp[9:] == ["-", "2", "1.33x", "1.00x", "4.0", "50.0%", "0.0%"]


@pytest.mark.parametrize("style", ["json", "csv"])
def test_results_for_programs_are_the_view(db: str, style: str) -> None:
    text = invoke("results", "demo", "--format", style, db=db).stdout
    rows = json.loads(text) if style == "json" else list(csv.DictReader(io.StringIO(text)))
    assert [tuple(row) for row in rows] == [VIEWS["results"]] * 2
    assert [row["method"] for row in rows] == ["greedy", "harp"]
    assert [float(row["relative_cost"]) for row in rows] == [1.0, pytest.approx(4 / 3)]
    assert [row["p_value"] for row in rows] == ([None] * 2 if style == "json" else [""] * 2)


def test_results_of_an_unfinished_run_are_none_yet(db: str) -> None:
    result = invoke("results", "other", db=db)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "harp-batch status other" in result.stderr
    assert json.loads(invoke("results", "other", "--format", "json", db=db).stdout) == []


def test_status_lists_runs(db: str) -> None:
    rows = json.loads(invoke("status", "--format", "json", db=db).stdout)
    assert {row["id"]: (row["name"], row["status"], row["answered"], row["requests"]) for row in rows} == {
        "aaa1": ("demo", "done", 4, 4),
        "bbb2": ("other", "running", 0, 4),
    }
    lines = [line.split() for line in invoke("status", "bbb2", db=db).stdout.splitlines()]
    assert [line[:3] for line in lines[-1:]] == [["other", "bbb2", "running?"]]
    assert "0/4" in lines[-1]


@pytest.mark.parametrize("command", [["status", "zzz"], ["results", "zzz"], ["resume", "zzz"]])
def test_a_run_that_does_not_exist(db: str, command: list[str]) -> None:
    result = invoke(*command, db=db)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert "'zzz'" in result.stderr


def test_query_prints_what_it_finds(db: str) -> None:
    sql = "select method, sum(output_tokens) as tokens from answers group by method order by method"
    assert invoke("query", sql, "--format", "csv", db=db).stdout == "method,tokens\ngreedy,4\nharp,4\n"
    assert json.loads(invoke("query", sql, "--format", "json", db=db).stdout)[1] == {
        "method": "harp",
        "tokens": 4,
    }


def test_query_shows_a_models_text_on_one_line_without_escapes(db: str) -> None:
    shown = invoke("query", "select text from answers limit 1", db=db).stdout
    assert shown.splitlines()[-1] == "a\\x1b[31mb\\nc"


def test_query_says_that_there_is_more(db: str) -> None:
    result = invoke("query", "select * from tokens", "--max-rows", "3", "--format", "csv", db=db)
    assert len(result.stdout.splitlines()) == 4
    assert result.stderr == "only the first 3 rows are shown; --max-rows N shows more\n"
    assert invoke("query", "select 1", db=db).stderr == ""


def test_query_cannot_write(db: str) -> None:
    result = invoke("query", "delete from answers", db=db)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(json.loads(invoke("status", "--format", "json", db=db).stdout)) == 2


@pytest.mark.parametrize(
    "command", [["status"], ["results", "latest"], ["query", "select 1"], ["resume", "latest"]]
)
def test_reading_makes_no_database(tmp_path: Path, command: list[str]) -> None:
    result = invoke(*command, db=f"sqlite:///{tmp_path}/none.db")
    assert (result.exit_code, result.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_db_upgrade_makes_the_tables(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    assert invoke("db", "upgrade", db=url).exit_code == 0
    assert invoke("db", "check", db=url).stdout == "the database's schema is current\n"
    assert json.loads(invoke("status", "--format", "json", db=url).stdout) == []


def test_the_database_comes_from_the_environment(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARP_BATCH_DB", db)
    assert len(json.loads(CliRunner().invoke(app, ["status", "--format", "json"]).stdout)) == 2


def summary(status: RunStatus, answered: int, error: str | None = None) -> RunSummary:
    return RunSummary("aaa1", "demo", status, NOW, NOW, 2, 4, answered, 1, error)


def test_the_end_of_a_run_names_the_next_commands() -> None:
    assert ending(summary(RunStatus.DONE, 4), " --db sqlite:///x.db").splitlines() == [
        "run demo (aaa1) is done, 4 of 4 answers, 1 of them errors",
        "",
        "  harp-batch results aaa1 --db sqlite:///x.db",
        "  harp-batch query \"select * from answers where run_id = 'aaa1' and not correct\" --db sqlite:///x.db",
    ]
    interrupted = ending(summary(RunStatus.INTERRUPTED, 3))
    assert interrupted.splitlines()[-1].strip() == "harp-batch resume aaa1"


@pytest.mark.parametrize(
    ("job", "named"),
    [
        ("name: demo\nmodles: []\n", "modles"),
        ("", "empty"),
        ("name: [", "job.yaml:"),
    ],
)
def test_submit_refuses_a_bad_job_before_anything_starts(tmp_path: Path, job: str, named: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(job, encoding="utf-8")
    result = invoke("submit", str(path), db=f"sqlite:///{tmp_path}/runs.db")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {path}")
    assert named in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/runs.db", "postgresql://me@127.0.0.1:9/harp"])
def test_a_dry_run_refuses_a_database_that_cannot_be_used(tmp_path: Path, url: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("{name: a, models: [m], tasks: [t], methods: [greedy]}", encoding="utf-8")
    result = invoke("submit", str(path), "--dry-run", db=url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert "folder" in result.stderr or "127.0.0.1" in result.stderr


def test_models_pull_refuses_what_is_no_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["models", "pull", str(tmp_path / "none.gguf")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "none.gguf" in result.stderr
