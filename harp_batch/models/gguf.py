"""A .gguf file as a directory of safetensors, converted once: reading one takes half a minute."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

from harp_batch.cache import cache_folder
from harp_batch.errors import ModelError
from harp_batch.models.quiet import quiet_transformers

_LAYOUT = "v1"  # raise it when a conversion made by older code must not be used any more


def converted_path(sha256: str, name: str) -> Path:
    """Return where the conversion of the .gguf file with this hash lies, whether or not it exists."""
    return cache_folder() / "models" / f"{name}-{_LAYOUT}-{sha256[:16]}"


def converted(file: Path, sha256: str, name: str) -> Path:
    """Return the directory with the file's float32 weights and tokenizer; make it where it is missing.

    It appears in one step, so that an interrupted or concurrent conversion is never seen half done.
    Raises ModelError where transformers cannot read the file.
    """
    target = converted_path(sha256, name)
    if target.is_dir():
        return target
    with _scratch_folder(target.parent) as scratch:
        made = Path(scratch) / "model"
        _convert(file, made)
        publish(made, target)
    return target


def _scratch_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a folder on the disk of the target, so that the result can be moved there in one step."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=parent, prefix=".converting-")
    except OSError as error:
        raise ModelError(
            f"the cache folder {parent} cannot be written ({error.strerror}); set HARP_BATCH_CACHE_DIR to another"
        ) from error


def publish(made: Path, target: Path) -> None:
    """Move a finished conversion to its place; drop it where another process was quicker."""
    try:
        os.replace(made, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)


def _convert(file: Path, made: Path) -> None:
    try:
        with (
            quiet_transformers(),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # its progress bar has no switch
            _save(file.parent, file.name, made)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{file} cannot be read as a GGUF model: {reason[0]}") from error


def _save(folder: Path, name: str, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize`, transformers may keep the weights in GGUF's own blocks, which cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False).save_pretrained(made)
