"""Where each task's YAML file lies.

lm-eval parses its 14,000 YAML files to know that, which takes 13 seconds. Every name stands in a line of its
own, `task: NAME`, so a regular expression finds them all in one or two, and the cache folder remembers them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml  # the only reader of `include:` and `!function`

from harp_batch.cache import cache_folder, read_json, write_json
from harp_batch.errors import TaskError

LM_EVAL_FOLDER = Path(lm_eval.tasks.__file__).parent
OWN_FOLDER = Path(__file__).parents[1] / "eval_tasks"
_NAME = re.compile(r"""^["']?(task|group)["']?:[ \t]*["']?([^"'\s#\[{][^"'\n#]*)""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Names found in one folder; the paths are relative to it."""

    tasks: Mapping[str, str]
    groups: Mapping[str, str]


def find_yaml(name: str) -> Path:
    """Return the YAML file that defines the task, ours before lm-eval's.

    Raises TaskError where there is none, with near names, and for a group of tasks, with some of its members.
    """
    own, theirs = scan(OWN_FOLDER), _lm_eval_catalogue()
    if name in own.tasks:
        return OWN_FOLDER / own.tasks[name]
    if name in theirs.tasks:
        return LM_EVAL_FOLDER / theirs.tasks[name]
    if name in theirs.groups:
        raise TaskError(_is_a_group(name, LM_EVAL_FOLDER / theirs.groups[name]))
    near = difflib.get_close_matches(name, [*own.tasks, *theirs.tasks], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
    raise TaskError(f"there is no task {name!r} in lm-eval {version('lm_eval')}; {hint}")


def scan(folder: Path) -> Catalogue:
    """Return the tasks and groups that the folder's YAML files define; of two namesakes, the first counts."""
    found: dict[str, dict[str, str]] = {"task": {}, "group": {}}
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: path.as_posix()):
        names = dict(reversed(_NAME.findall(path.read_text(encoding="utf-8", errors="replace"))))
        kind = "group" if "group" in names else "task"
        if kind in names:
            found[kind].setdefault(names[kind].strip(), path.relative_to(folder).as_posix())
    return Catalogue(found["task"], found["group"])


def _lm_eval_catalogue() -> Catalogue:
    note = cache_folder() / "tasks" / f"lm-eval-{version('lm_eval')}.json"
    known = read_json(note)
    if isinstance(known, dict) and known.get("folder") == _state():
        return Catalogue(known["tasks"], known["groups"])
    catalogue = scan(LM_EVAL_FOLDER)
    write_json(note, {"folder": _state(), **asdict(catalogue)})
    return catalogue


def _state() -> list[str | int]:
    """Return what tells one installation of lm-eval from another."""
    return [str(LM_EVAL_FOLDER), LM_EVAL_FOLDER.stat().st_mtime_ns]


def _is_a_group(name: str, path: Path) -> str:
    members = load_yaml(path, resolve_func=False).get("task") or []
    names = [member if isinstance(member, str) else member.get("task", "") for member in members]
    shown = ", ".join([str(member) for member in names if member][:3])
    return f"{name!r} is a group of lm-eval tasks; name the ones you mean, for example {shown}"
