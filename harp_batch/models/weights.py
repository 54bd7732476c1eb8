"""Weight files: which ones a directory holds, their hash and their number of parameters."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

from harp_batch.cache import cache_folder, read_json, write_json
from harp_batch.errors import ModelError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files that transformers would load, sorted by name.

    Raises ModelError where there are none or one is missing. Pickles are never read: they can run code.
    """
    single = directory / "model.safetensors"  # transformers looks for it before any index
    files = [single] if single.is_file() else _indexed_files(directory) or [single]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return tuple(files)
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory} holds pickled weights only ({pickles[0]}), which are not read; "
            "convert them to safetensors"
        )
    raise ModelError(f"{directory} has no {missing[0]}; a model is config.json, safetensors and a tokenizer")


def _indexed_files(directory: Path) -> list[Path]:
    index = read_json(directory / "model.safetensors.index.json")
    names = sorted(set(index.get("weight_map", {}).values())) if isinstance(index, dict) else []
    if any(Path(name).name != name for name in names):
        raise ModelError(f"{directory}: model.safetensors.index.json names files outside of the directory")
    return [directory / name for name in names]


def count_parameters(files: Sequence[Path]) -> int:
    """Return how many numbers the safetensors files hold; raise ModelError where one is damaged."""
    return sum(math.prod(shape) for file in files for shape in _shapes(file))


def _shapes(file: Path) -> list[list[int]]:
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(size, _MAX_HEADER)))
        return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not a safetensors file; fetch it again") from error


def sha256_of_files(files: Sequence[Path]) -> str:
    """Return one SHA-256 for a model: over the lines `HASH  NAME` of its weight files, sorted by name."""
    lines = [f"{sha256_of_file(file)}  {file.name}\n" for file in sorted(files, key=lambda file: file.name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_of_file(file: Path) -> str:
    """Return the file's SHA-256; it is remembered in the cache folder until size or time change."""
    stat = file.stat()
    state = [stat.st_size, stat.st_mtime_ns]
    name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    note = cache_folder() / "hashes" / f"{name}.json"
    known = read_json(note)
    if isinstance(known, dict) and known.get("state") == state:
        return str(known["sha256"])
    digest = file_digest(file)
    write_json(note, {"state": state, "sha256": digest})
    return digest


def file_digest(file: Path) -> str:
    """Return the file's SHA-256 by reading it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
