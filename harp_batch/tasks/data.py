"""Where a task's documents come from: a data folder, the YAML's own folder or the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub import errors as hub_errors

from harp_batch.errors import TaskError
from harp_batch.tasks.catalogue import LM_EVAL_FOLDER

_TIMEOUT = 5.0  # seconds until the hub counts as unreachable
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


def evaluation_split(config: Mapping[str, Any]) -> str | None:
    """Return the split whose documents are asked, by lm-eval's rule."""
    return config.get("test_split") or config.get("validation_split")


def needed_splits(config: Mapping[str, Any], num_fewshot: int) -> list[str]:
    """Return the splits that must be there: the one that is asked and the one that gives the examples."""
    fewshot = config.get("fewshot_config") or {}
    examples = None
    if num_fewshot > 0 and not fewshot.get("samples"):
        examples = fewshot.get("split") or config.get("fewshot_split") or config.get("training_split")
        examples = examples or config.get("validation_split")
    return list(dict.fromkeys(split for split in (evaluation_split(config), examples) if split))


def local_overrides(
    name: str, yaml: Path, config: Mapping[str, Any], num_fewshot: int, data_dir: Path | None
) -> dict[str, Any]:
    """Return the settings that make the task read local files, or nothing where there are none for it.

    Files are DATA_DIR/TASK/SPLIT.jsonl, where TASK may also be the folder that lm-eval keeps the task in, so
    that `mmlu_pro` serves all of its subjects. Raises TaskError where a needed split has no file.
    """
    folder = _folder(name, yaml, data_dir)
    if folder is None:
        return _beside_yaml(yaml, config)
    files = {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))}
    missing = [f"{split}.jsonl" for split in needed_splits(config, num_fewshot) if split not in files]
    if missing:
        raise TaskError(f"task {name!r} needs {' and '.join(missing)} in {folder}")
    return {
        **_without_absent_splits(config, files),
        "custom_dataset": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }


def _folder(name: str, yaml: Path, data_dir: Path | None) -> Path | None:
    if data_dir is None:
        return None
    names = [name]
    if yaml.is_relative_to(LM_EVAL_FOLDER):
        names.append(yaml.relative_to(LM_EVAL_FOLDER).parts[0])
    return next((data_dir / each for each in names if (data_dir / each).is_dir()), None)


def _without_absent_splits(config: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """lm-eval opens every split that the task names, even for zero examples: drop those that have no file."""
    dropped: dict[str, Any] = {key: None for key in _SPLIT_KEYS if config.get(key) not in (None, *files)}
    fewshot = config.get("fewshot_config") or {}
    if fewshot.get("split") not in (None, *files):
        dropped["fewshot_config"] = {key: value for key, value in fewshot.items() if key != "split"}
    return dropped


def _beside_yaml(yaml: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval reads `data_files` relative to the working directory; ours lie beside the YAML."""
    kwargs = config.get("dataset_kwargs") or {}
    files = kwargs.get("data_files")
    if config.get("dataset_path") != "json" or not isinstance(files, dict):
        return {}
    absolute = {split: str(_absolute(file, yaml.parent)) for split, file in files.items()}
    return {"dataset_kwargs": {**kwargs, "data_files": absolute}}


def _absolute(file: str, folder: Path) -> Path | str:
    return folder / file if (folder / file).is_file() else file


@contextlib.contextmanager
def reachable_hub(dataset: str | None) -> Iterator[None]:
    """Let `datasets` use its cache alone inside of the block where the hub does not answer.

    Left to itself it tries for 23 seconds, for data in its cache as well.
    """
    offline = dataset is not None and dataset != "json" and not _hub_has(dataset)
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _hub_has(dataset: str) -> bool:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.HfApi().dataset_info(dataset, timeout=_TIMEOUT)
    except hub_errors.RepositoryNotFoundError:
        return True  # the hub is there; loading says what is wrong with the name or the rights
    except Exception:  # noqa: BLE001 - the errors of the hub's transport have no public base class
        return False
    return True
