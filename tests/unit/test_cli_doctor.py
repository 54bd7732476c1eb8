"""`doctor`: what it finds, and how each finding is mended."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from harp_batch.cli import checks
from harp_batch.cli.app import app
from harp_batch.cli.checks import Level
from harp_batch.store import migrate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARP_BATCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_doctor_looks_at_everything(tmp_path: Path) -> None:
    typed = ["doctor", "--db", f"sqlite:///{tmp_path}/runs.db", "--format", "json"]
    result = CliRunner().invoke(app, typed)
    found = {row["check"]: row for row in json.loads(result.stdout)}
    assert list(found) == [
        "python",
        "torch",
        "ray",
        "transformers",
        "lm-eval",
        "database",
        "cache",
        "demo model",
        "data",
    ]
    assert result.exit_code == 0
    assert found["demo model"]["level"] == "warn"
    assert "harp-batch models pull" in found["demo model"]["mend"]
    assert not (tmp_path / "runs.db").exists()


def test_doctor_fails_with_3_and_says_how_to_mend(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--db", f"sqlite:///{tmp_path}/no/such/folder.db"])
    lines = result.stdout.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("fail  database"))
    assert "-> name another database" in lines[at + 1]
    assert result.exit_code == 3


def test_database_states(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    assert checks.database(url).level is Level.OK
    assert "empty" in checks.database(url).finding
    migrate.upgrade(url)
    assert checks.database(url) == checks.Check("database", Level.OK, url)


def test_a_password_is_not_shown() -> None:
    check = checks.database("postgresql://me:secret@127.0.0.1:9/harp")
    assert check.level is Level.FAIL
    assert "secret" not in check.finding


def test_a_library_that_is_missing() -> None:
    check = checks.library("no-such-library", "no_such_library")
    assert check.level is Level.FAIL
    assert "pip install" in check.mend


def test_a_library_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    check = checks.library("broken-library", "broken_library")
    assert check.level is Level.FAIL
    assert check.finding == "cannot be imported: OSError: libcudart.so.12: cannot open"


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HARP_BATCH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    check = checks.cache()
    assert check.level is Level.FAIL
    assert "HARP_BATCH_CACHE_DIR" in check.mend


def test_data_folders(tmp_path: Path) -> None:
    assert checks.data(None).level is Level.OK
    assert checks.data(tmp_path).level is Level.WARN
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("{}\n")
    assert checks.data(tmp_path) == checks.Check("data", Level.OK, f"{tmp_path}: gsm8k")


def test_the_demo_names_one_model() -> None:
    """The doctor, the Makefile and the demo's job file mean the same model."""
    named = [
        *re.findall(r"^DEMO_MODEL := (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M),
        *re.findall(r"wheel:\S+\.gguf", (ROOT / "jobs" / "demo.yaml").read_text(encoding="utf-8")),
    ]
    assert len(named) >= 2
    assert set(named) == {checks.DEMO_MODEL}
