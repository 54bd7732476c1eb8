"""Help: quick, with examples, and the same in docs/cli.md."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from harp_batch.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
HEAVY = [
    "torch",
    "transformers",
    "ray",
    "lm_eval",
    "datasets",
    "sqlalchemy",
    "pydantic",
    "rich",
    "numpy",
    "scipy",
]


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        return [path]
    return [leaf for name, child in command.commands.items() for leaf in leaves(child, (*path, name))]


def test_the_commands_are_those_of_the_contract() -> None:
    assert {" ".join(path) for path in leaves(app)} == {
        "submit",
        "resume",
        "cancel",
        "status",
        "logs",
        "results",
        "query",
        "export",
        "db upgrade",
        "db check",
        "models pull",
        "doctor",
        "completion",
    }


@pytest.mark.parametrize("path", leaves(app), ids=" ".join)
def test_help_gives_two_or_three_examples(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    below = result.stdout.partition("Examples:")[2].splitlines()
    assert len([line for line in below if f"harp-batch {' '.join(path)}" in line]) in (2, 3)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["submit", "--help"], ["--version"], ["completion", "bash"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import json, sys\n"
        "from harp_batch.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert set(json.loads(done.stderr)) & set(HEAVY) == set()


@pytest.mark.parametrize("command", ["status", "results", "query", "export --canonical"])
def test_reading_commands_load_no_engine(command: str, tmp_path: Path) -> None:
    """Somebody who looks at results does not wait for torch and Ray."""
    code = (
        "import sys\n"
        "from harp_batch.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print({'torch', 'ray', 'lm_eval'} & set(sys.modules), file=sys.stderr)"
    )
    url = f"sqlite:///{tmp_path}/none.db"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "select 1", "--db", url],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "set()"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_program(shell: str) -> None:
    result = CliRunner().invoke(app, ["completion", shell])
    assert result.exit_code == 0
    assert f"_HARP_BATCH_COMPLETE={shell}_complete" in result.stdout


def test_completion_completes() -> None:
    """What the shell's script asks the program on TAB."""
    done = subprocess.run(
        [sys.executable, "-c", "from harp_batch.cli import main; main()"],
        env={"_HARP_BATCH_COMPLETE": "bash_complete", "COMP_WORDS": "harp-batch re", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert {line.split(",")[1] for line in done.stdout.splitlines()} == {"results", "resume"}


def test_docs_are_the_help() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "cli.py"))["page"]()
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == page, "docs/cli.md is older than the commands: run `make docs`"
