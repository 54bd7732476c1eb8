"""A task's name -> lm-eval's task object with its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from harp_batch.errors import TaskError
from harp_batch.tasks.catalogue import find_yaml
from harp_batch.tasks.data import local_overrides, needed_splits, reachable_hub
from harp_batch.tasks.problems import DATA_ERRORS, first_line
from harp_batch.tasks.quiet import quiet_lm_eval

SUPPORTED = ("generate_until", "loglikelihood", "multiple_choice")
_NOT_TASK_SETTINGS = ("tag", "group", "task_list")


def open_task(name: str, num_fewshot: int | None, data_dir: Path | None) -> ConfigurableTask:
    """Return lm-eval's task with its documents loaded and `num_fewshot` settled.

    Raises TaskError where there is no such task, it asks for something that is not supported, or its data
    cannot be had; without network that takes seconds, not minutes.
    """
    yaml = find_yaml(name)
    _refuse_unsupported(name, load_yaml(yaml, resolve_func=False))  # before any helper code of the task runs
    config = _read_config(name, yaml)
    shots = _settled_fewshot(name, config, num_fewshot)
    config |= local_overrides(name, yaml, config, shots, data_dir)
    task = _build(name, config, shots, data_dir)
    task.set_config("num_fewshot", shots)
    return task


def _read_config(name: str, yaml: Path) -> dict[str, Any]:
    try:
        with quiet_lm_eval():
            config = load_yaml(yaml)
    except ImportError as error:
        raise TaskError(_needs_package(name, error)) from error
    except (OSError, *DATA_ERRORS) as error:  # helper code may load metrics and data as it is imported
        raise TaskError(f"task {name!r}: its helper code cannot be loaded ({first_line(error)})") from error
    return {key: value for key, value in config.items() if key not in _NOT_TASK_SETTINGS}


def _needs_package(name: str, error: ImportError) -> str:
    return f"task {name!r} needs the Python package {error.name!r}; run `pip install {error.name}`"


def _refuse_unsupported(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("output_type", "generate_until")
    obstacles = {
        f"its output_type is {kind} (supported: {', '.join(SUPPORTED)})": kind not in SUPPORTED,
        f"it asks every document {config.get('repeats')} times": (config.get("repeats") or 1) > 1,
        "it is a Python class": "class" in config,
        "it runs code that the model wrote": bool(config.get("unsafe_code")),
        "it needs images or sound": bool(config.get("doc_to_image") or config.get("doc_to_audio")),
    }
    for reason, applies in obstacles.items():
        if applies:
            raise TaskError(f"task {name!r} is not supported: {reason}")


def _settled_fewshot(name: str, config: Mapping[str, Any], asked: int | None) -> int:
    """Return the number of examples by lm-eval's rule, which lets a task insist on zero."""
    own: int | None = config.get("num_fewshot")
    if own == 0 and asked:
        raise TaskError(f"task {name!r} fixes num_fewshot to 0; remove num_fewshot from the job")
    return own or 0 if asked is None else asked


def _build(name: str, config: dict[str, Any], shots: int, data_dir: Path | None) -> ConfigurableTask:
    dataset = config.get("dataset_path")
    try:
        with quiet_lm_eval(), reachable_hub(dataset):
            return ConfigurableTask(config=config)
    except ImportError as error:
        raise TaskError(_needs_package(name, error)) from error
    except OSError as error:  # `datasets` reports an unreachable hub and missing files with this class
        splits = ", ".join(f"{split}.jsonl" for split in needed_splits(config, shots))
        where = f"{data_dir}/{name}" if data_dir else f"DIR/{name}"
        raise TaskError(
            f"task {name!r}: the data set {dataset} is neither in the cache nor can it be fetched; "
            f"give `--data-dir {data_dir or 'DIR'}` with {splits} in {where}"
        ) from error
    except DATA_ERRORS as error:
        raise TaskError(
            f"task {name!r} cannot use its data ({first_line(error)}); check its schema"
        ) from error
