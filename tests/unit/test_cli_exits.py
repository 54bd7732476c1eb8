"""However a command ends: one sentence on stderr, the right exit code, no traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from harp_batch import errors
from harp_batch.cli.app import App, app

EVERY_ERROR = [
    e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.HarpBatchError)
]


def run_command(body: Callable[[], None]) -> Result:
    group = App("harp-batch")
    group.add_command(click.Command("go", callback=body))
    return CliRunner().invoke(group, ["go"])


def raiser(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_an_error_is_a_sentence_and_its_exit_code(kind: type[errors.HarpBatchError]) -> None:
    result = run_command(raiser(kind("the thing is wrong; mend it")))
    assert result.stderr == "Error: the thing is wrong; mend it\n"
    assert result.stdout == ""
    assert result.exit_code == (2 if issubclass(kind, errors.UserError) else 3)


def test_an_interruption_is_130() -> None:
    result = run_command(raiser(KeyboardInterrupt()))
    assert (result.exit_code, result.stderr) == (130, "Error: interrupted\n")


def test_an_unexpected_error_leaves_its_traceback_in_a_file() -> None:
    result = run_command(raiser(ZeroDivisionError("by zero\nand more")))
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1
    assert "ZeroDivisionError: by zero;" in result.stderr
    log = Path(re.search(r"traceback in (\S+\.log)", result.stderr)[1])
    try:
        assert "in body" in log.read_text(encoding="utf-8")
    finally:
        log.unlink()


def test_the_traceback_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARP_BATCH_DEBUG", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "Traceback (most recent call last)" in run_command(raiser(ValueError("x"))).stderr


def test_a_command_may_end_with_its_own_code() -> None:
    assert run_command(lambda: click.get_current_context().exit(3)).exit_code == 3
    assert run_command(lambda: None).exit_code == 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["sbmit"], "submit"),
        (["reslts"], "results"),
        (["db", "upgrde"], "upgrade"),
        (["submit", "--limt"], "--limit"),
        (["status", "--fromat"], "--format"),
    ],
)
def test_a_typo_gets_a_suggestion(typed: list[str], meant: str) -> None:
    result = CliRunner().invoke(app, typed)
    assert result.exit_code == 2
    assert f"Did you mean '{meant}'?" in result.stderr


@pytest.mark.parametrize(
    "typed",
    [
        ["submit"],
        ["submit", "job.yaml", "--limit", "0"],
        ["submit", "job.yaml", "--data-dir", "no-such-folder"],
        ["status", "--format", "xml"],
        ["query", "select 1", "--max-rows", "many"],
        ["completion", "tcsh"],
    ],
)
def test_wrong_usage_is_2(typed: list[str]) -> None:
    result = CliRunner().invoke(app, typed)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from harp_batch.cli import main; main()", *arguments]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """More than a pipe holds is written to a reader that never reads."""
    code = "from harp_batch.cli.output import write; write('x' * 10_000_000); write('y')"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_the_program_itself_exits_cleanly(tmp_path: Path) -> None:
    done = subprocess.run(
        program("submit", "no-such-job.yaml"), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: no-such-job.yaml")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
