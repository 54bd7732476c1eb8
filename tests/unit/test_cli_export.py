"""``harp-batch export --canonical``: what is in it, what is not, and where it goes."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from harp_batch.cli.app import app
from harp_batch.records import Answer, FinishReason, RunStatus, TokenTrace
from harp_batch.store import RunRecord, open_store
from tests.support.store_records import a_request, a_run, an_answer, end_run

DOCUMENTS = 3
REQUESTS = tuple(map(a_request, range(DOCUMENTS)))


@pytest.fixture
def url(tmp_path: Path) -> str:
    folder = tmp_path / "database"
    folder.mkdir()
    return f"sqlite:///{folder / 'runs.db'}"


def answers(run: RunRecord) -> list[Answer]:
    """An answer to every request of the run."""
    return [an_answer(e.id, doc_id) for e in run.evaluations for doc_id in range(DOCUMENTS)]


def save(url: str, run: RunRecord, committed: list[Answer]) -> None:
    with open_store(url) as store:
        store.create_run(run)
        store.commit(committed)


@pytest.fixture
def complete(url: str) -> RunRecord:
    """A run with all of its answers, in the database."""
    run = a_run(REQUESTS, id="aaa1")
    save(url, run, answers(run))
    return run


@pytest.fixture
def begun(url: str) -> RunRecord:
    """A run that lacks one answer."""
    run = a_run(REQUESTS, id="bbb2")
    save(url, run, answers(run)[:-1])
    return run


def export(url: str, run: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", run, "--canonical", "--db", url, *arguments])


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout_bytes.decode().split("\n")[:-1]]


def sha256(result: Result) -> str:
    return hashlib.sha256(result.stdout_bytes).hexdigest()


class TestWhatIsInIt:
    def test_a_header_and_a_line_for_each_answer(self, url: str, complete: RunRecord) -> None:
        result = export(url, "latest")
        header, *rest = lines(result)
        assert header == {"format": "harp-batch canonical export", "version": 1}
        assert [(r["method"]["name"], r["doc_id"]) for r in rest] == [
            (method, doc_id) for method in ("greedy", "harp") for doc_id in range(DOCUMENTS)
        ]
        assert (result.exit_code, result.stderr) == (0, f"sha256 {sha256(result)}\n")

    def test_runs_that_differ_in_all_but_their_answers_give_the_same_bytes(
        self, url: str, complete: RunRecord
    ) -> None:
        """Another id, name, time, machine and duration; answers that came in another order, in many commits."""
        (model,) = complete.models
        later = a_run(
            REQUESTS,
            id="ccc3",
            name="another",
            created_at=datetime(2020, 1, 1, tzinfo=UTC),
            status=RunStatus.RUNNING,
            job_yaml="name: another\n",
            versions={"python": "4", "platform": "VAX"},
            models=(replace(model, revision="v2", parameters=7),),
        )
        later = replace(later, evaluations=later.evaluations[::-1])
        save(url, later, [])
        with open_store(url) as store:
            for place, answer in enumerate(answers(later)[::-1]):
                store.commit([replace(answer, seconds=place + 0.125)])
            end_run(store, "ccc3", RunStatus.INTERRUPTED)
        assert export(url, "aaa1").stdout_bytes == export(url, "ccc3").stdout_bytes
        assert export(url, "ccc3").exit_code == 0

    CHANGES: dict[str, Any] = {  # noqa: RUF012
        "doc_id": 9,
        "repeat": 1,
        "finish_reason": FinishReason.LENGTH,
        "text": "5",
        "choices": ((-0.5, True),),
        "prompt_tokens": 99,
        "forward_tokens": 99,
        "error": "broken",
        "scores": {"exact_match,strict": 0.0},
        "correct": None,
    }
    TRACE: dict[str, Any] = {  # noqa: RUF012
        "token_ids": (7, 8, 10),
        "entropy": (0.5, 1.25, 3.0000002),  # the next float32 above 3
        "hesitated": (True, True, True),
        "vanilla_token_ids": (7, 8, 9),
        "flipped": (False, True, True),
    }

    def test_no_field_is_forgotten(self) -> None:
        assert {f.name for f in fields(Answer)} == {*self.CHANGES, "trace", "evaluation_id", "seconds"}
        assert {f.name for f in fields(TokenTrace)} == {*self.TRACE}

    @pytest.mark.parametrize("field", [*CHANGES, *TRACE])
    def test_every_field_of_an_answer_counts(self, url: str, complete: RunRecord, field: str) -> None:
        other = a_run(REQUESTS, id="ddd4")
        first, *rest = answers(other)
        if field in self.TRACE:
            changed = replace(first, trace=replace(first.trace, **{field: self.TRACE[field]}))
        else:
            changed = replace(first, **{field: self.CHANGES[field]})
        save(url, other, [changed, *rest])
        assert export(url, "aaa1").stdout_bytes != export(url, "ddd4").stdout_bytes

    @pytest.mark.parametrize("field", ["ref", "weights_sha256", "dtype", "task", "method", "settings"])
    def test_what_was_asked_counts(self, url: str, complete: RunRecord, field: str) -> None:
        run = a_run(REQUESTS, id="ddd4")
        (model,), (task,) = run.models, run.tasks
        if field in ("method", "settings"):
            own = {"method": "zzz", "settings": {"kind": "harp", "theta": 1.0000000000000002}}[field]
            first, last = run.evaluations
            run = replace(run, evaluations=(first, replace(last, **{field: own})))
        else:
            models = (model if field == "task" else replace(model, **{field: "other"}),)
            tasks = (replace(task, model=models[0].ref, task="other" if field == "task" else task.task),)
            evaluations = tuple(replace(e, model=tasks[0].model, task=tasks[0].task) for e in run.evaluations)
            run = replace(run, models=models, tasks=tasks, evaluations=evaluations)
        save(url, run, answers(run))
        assert export(url, "aaa1").stdout_bytes != export(url, "ddd4").stdout_bytes


class TestUnfinished:
    @pytest.mark.parametrize("to_file", [False, True])
    def test_what_is_there_is_written_and_the_rest_is_told(
        self, url: str, begun: RunRecord, tmp_path: Path, to_file: bool
    ) -> None:
        file = tmp_path / "part.jsonl"
        result = export(url, "bbb", *(["-o", str(file)] if to_file else []))
        written = file.read_bytes() if to_file else result.stdout_bytes
        assert result.exit_code == 3
        assert written.count(b"\n") == 2 * DOCUMENTS
        assert result.stderr.splitlines()[-1] == (
            "1 of 6 answers of run nightly (bbb2) are missing; `harp-batch resume bbb2` computes them"
        )

    def test_a_run_without_answers_is_its_header(self, url: str) -> None:
        save(url, a_run(REQUESTS, id="eee5"), [])
        result = export(url, "eee5")
        assert (result.exit_code, len(lines(result))) == (3, 1)
        assert "6 of 6 answers" in result.stderr


class TestFile:
    def test_it_holds_the_bytes_of_stdout(self, url: str, complete: RunRecord, tmp_path: Path) -> None:
        file = tmp_path / "a b.jsonl"
        result = export(url, "latest", "-o", str(file))
        assert (result.exit_code, result.stderr) == (0, "")
        shown = export(url, "latest")
        assert file.read_bytes() == shown.stdout_bytes
        assert result.stdout == f"{sha256(shown)}  {file}\n"

    @pytest.mark.skipif(not shutil.which("sha256sum"), reason="there is no sha256sum")
    @pytest.mark.parametrize("name", ["a.jsonl", "two words", "back\\slash", "line\nbreak", "\u00e9"])
    def test_sha256sum_takes_the_checksum(
        self, url: str, complete: RunRecord, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        line = export(url, "latest", "-o", name).stdout_bytes
        check = ["sha256sum", "--strict", "-c"]
        assert subprocess.run(check, input=line, capture_output=True).returncode == 0
        Path(name).write_bytes(b"changed")
        assert subprocess.run(check, input=line, capture_output=True).returncode == 1

    def test_an_older_file_is_replaced_and_a_link_stays_a_link(
        self, url: str, complete: RunRecord, tmp_path: Path
    ) -> None:
        real, link = tmp_path / "real", tmp_path / "link"
        real.write_text("old")
        link.symlink_to(real)
        assert export(url, "latest", "-o", str(link)).exit_code == 0
        assert link.is_symlink()
        assert real.read_bytes() == export(url, "latest").stdout_bytes
        assert sorted(p.name for p in tmp_path.iterdir()) == ["database", "link", "real"]

    def test_an_export_that_breaks_leaves_the_older_file(
        self, url: str, complete: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last answer cannot be read, when the others have been written already."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "database"))  # of the traceback
        file = tmp_path / "old.jsonl"
        file.write_text("old")
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            connection.execute("UPDATE answer_rows SET scores = '{' WHERE evaluation_id = 'aaa1/harp'")
        result = export(url, "latest", "-o", str(file))
        assert (result.exit_code, result.stdout) == (3, "")
        assert file.read_text() == "old"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["database", "old.jsonl"]

    @pytest.mark.parametrize(
        "name", ["database", "/dev/null", "no/such/folder/a.jsonl", "file/a.jsonl", "x" * 300]
    )
    def test_a_place_that_cannot_be_written_is_refused(
        self, url: str, complete: RunRecord, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "file").touch()
        result = export(url, "latest", "-o", str(tmp_path / name))
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"Error: {tmp_path / name} ")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["database", "file"]

    def test_a_full_disk_leaves_nothing_behind(self, url: str, tmp_path: Path) -> None:
        """As good as full: no file of this process may grow beyond what SQLite needs to read."""
        run = a_run(REQUESTS[:1])
        save(url, run, [an_answer(e.id, text="x" * 100_000) for e in run.evaluations])
        done = subprocess.run(
            program(url, "-o", "a.jsonl"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)),
        )
        assert (done.returncode, done.stdout) == (3, "")
        assert (
            done.stderr == "Error: a.jsonl could not be written (File too large); mend that and try again\n"
        )
        assert [p.name for p in tmp_path.iterdir()] == ["database"]


def program(url: str, *arguments: str) -> list[str]:
    code = "from harp_batch.cli import main; main()"
    return [sys.executable, "-c", code, "export", "latest", "--canonical", "--db", url, *arguments]


def test_a_reader_that_has_seen_enough_is_no_error(url: str, complete: RunRecord) -> None:
    with subprocess.Popen(program(url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_the_form_must_be_named(url: str, complete: RunRecord) -> None:
    result = CliRunner().invoke(app, ["export", "latest", "--db", url])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "add --canonical" in result.stderr


def test_an_unknown_run_writes_no_file(url: str, complete: RunRecord, tmp_path: Path) -> None:
    result = export(url, "nope", "-o", str(tmp_path / "a.jsonl"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "aaa1" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["database"]


def test_no_database_is_made(tmp_path: Path) -> None:
    result = export(f"sqlite:///{tmp_path}/none.db", "latest")
    assert (result.exit_code, result.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []
