"""The wheel holds everything that an installed harp-batch reads beside its code."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_BACKEND = re.compile(r"No matching distribution|Could not find a version|Could not fetch|connection", re.I)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--retries=0", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    if done.returncode and NO_BACKEND.search(done.stderr):
        pytest.skip("the build backend (hatchling) cannot be fetched from the package index")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("harp_batch-*.whl"))) as archive:
        return set(archive.namelist())


def files_below(folder: Path) -> set[str]:
    return {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }


def test_migrations_are_in_the_wheel(wheel: set[str]) -> None:
    wanted = files_below(ROOT / "db" / "migrations")
    assert any(name.startswith("versions/") for name in wanted)
    assert {f"harp_batch/_migrations/{name}" for name in wanted} <= wheel


def test_demo_tasks_are_in_the_wheel(wheel: set[str]) -> None:
    wanted = files_below(ROOT / "harp_batch" / "eval_tasks")
    assert {Path(name).suffix for name in wanted} >= {".yaml", ".jsonl"}
    assert {f"harp_batch/eval_tasks/{name}" for name in wanted} <= wheel


def test_the_wheel_is_code_and_nothing_else(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.startswith("harp_batch-")} == {"harp_batch"}
