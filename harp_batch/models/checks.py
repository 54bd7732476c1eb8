"""What a model directory must be before anything is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harp_batch.errors import ModelError


def check_directory(directory: Path) -> None:
    """Raise ModelError unless the directory describes a causal language model without code of its own."""
    config = _read_object(directory / "config.json")
    for name, content in (("config.json", config), *_tokenizer_configs(directory)):
        if "auto_map" in content:
            raise ModelError(
                f"{directory} wants to run its own Python code ({name} has auto_map), which is refused; "
                "take a model that transformers has built in"
            )
    _check_architecture(directory, config)


def _tokenizer_configs(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    path = directory / "tokenizer_config.json"
    return [(path.name, _read_object(path))] if path.is_file() else []


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent} has no {path.name}; a model is config.json, safetensors and a tokenizer"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content


def _check_architecture(directory: Path, config: dict[str, Any]) -> None:
    named = config.get("architectures") or []
    shown = named[0] if named else config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{directory} is an encoder-decoder model ({shown}); HARP is for causal language models"
        )
    known = _causal_architectures()
    if named and not set(named) & set(known.values()):
        raise ModelError(f"{directory} is not a causal language model ({shown})")
    if config.get("model_type") not in known:
        raise ModelError(f"{directory}: transformers has no causal language model {shown!r}")


def _causal_architectures() -> dict[str, str]:
    # Imported here: it takes seconds, and the references of a job are checked before it is needed.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
