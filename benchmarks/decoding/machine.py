"""What the figures depend on and cannot be seen in them: the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_COPIED = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}  # bytes; far more than any cache
_COPIES = 5


def facts(device: str) -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "copy bandwidth": f"{copy_bandwidth(device) / 1e9:.1f} GB/s",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "lm_eval", "ray")},
        "commit": _commit(),
    }


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written a second by the fastest of a few big copies."""
    source = torch.zeros(_COPIED[device] // 4, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    seconds = min(_seconds_of_copy(source, target) for _ in range(_COPIES))
    return 2 * source.nbytes / seconds


def _seconds_of_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    synchronise(source.device)
    started = time.perf_counter()
    target.copy_(source)
    synchronise(source.device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The checkout's commit, and whether the files differ from it."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return f"{commit} with changes" if _git("status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
    return done.stdout.strip()
