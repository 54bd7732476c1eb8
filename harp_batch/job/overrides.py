"""``--set KEY=VALUE`` and ``--limit``: changes to a job's plain values before they are checked."""

from __future__ import annotations

from typing import Any

from harp_batch.job.problems import Origins, dotted, one_line
from harp_batch.job.reader import KeyPath, YamlProblem, read_yaml

LONGEST_KEY = 100  # as shown: room is left for what is wrong with it


def expand_shorthand(job: Any) -> None:
    """Give every model, task and method of ``job`` its long form, in place; ill-formed ones stay."""
    if not isinstance(job, dict):
        return
    _expand_items(job.get("models"), lambda text: {"ref": text})
    _expand_items(job.get("tasks"), lambda text: {"task": text})
    _expand_items(job.get("methods"), lambda text: {text: {}})
    for method in job["methods"] if isinstance(job.get("methods"), list) else ():
        if isinstance(method, dict):
            method.update({kind: {} for kind, settings in method.items() if settings is None})


def _expand_items(items: Any, long_form: Any) -> None:
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, str):
            items[index] = long_form(item)


def apply_override(job: Any, override: str, origins: Origins) -> None:
    """Set one ``a.b.0.c=VALUE`` in ``job``; raises :class:`~harp_batch.errors.JobError`."""
    key, equals, text = override.partition("=")
    shown = key or override
    label = f"--set {shown}" if len(shown) <= LONGEST_KEY else f"--set {shown[:LONGEST_KEY]}..."
    if not (key and equals):
        raise one_line(label, "needs the form KEY=VALUE")
    try:
        value = read_yaml(text).value
    except YamlProblem as problem:
        raise one_line(*filter(None, (label, dotted(problem.path), problem.problem))) from problem
    try:
        path = _assign(job, key.split("."), value)
    except LookupError as problem:
        raise one_line(label, str(problem.args[0])) from problem
    origins.replace(path, label)
    expand_shorthand(job)


def _assign(job: Any, parts: list[str], value: Any) -> KeyPath:
    """Put ``value`` at the end of ``parts``, growing mappings on the way; the path that it now has."""
    path: KeyPath = ()
    here = job
    for position, part in enumerate(parts):
        step = _step(here, part, path)
        path = (*path, step)
        if position == len(parts) - 1:
            here[step] = value
        elif isinstance(here, dict):
            here = here.setdefault(part, {})
        else:
            here = here[step]
    return path


def _step(here: Any, part: str, path: KeyPath) -> str | int:
    """``part`` as a key or index into ``here``; raises LookupError with a phrase for people."""
    where = ".".join(map(str, path)) or "the job"
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise LookupError(f"{where} has nothing inside it")
    if part not in map(str, range(len(here))):
        raise LookupError(f"{where} is a list of {len(here)}; give a number from 0 to {len(here) - 1}")
    return int(part)


def apply_limit(job: Any, limit: int, origins: Origins) -> None:
    """Let every task of ``job`` stop after ``limit`` documents."""
    tasks = job.get("tasks") if isinstance(job, dict) else None
    for index, task in enumerate(tasks if isinstance(tasks, list) else ()):
        if isinstance(task, dict):
            task["limit"] = limit
            origins.replace(("tasks", index, "limit"), "--limit")
