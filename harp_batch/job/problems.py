"""From what pydantic found to one sentence with file, line, key and remedy."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from harp_batch.errors import JobError
from harp_batch.job.reader import KeyPath, YamlProblem

LONGEST_MESSAGE = 500


class Origins:
    """Where each value of a job comes from: a line of a file, or an option of the command line."""

    def __init__(self, source: str, lines: dict[KeyPath, int]) -> None:
        self._source = source
        self._lines = dict(lines)
        self._options: dict[KeyPath, str] = {}

    def replace(self, path: KeyPath, option: str) -> None:
        """From now on ``path`` and all below it come from ``option``."""
        self._lines = {p: line for p, line in self._lines.items() if p[: len(path)] != path}
        self._options = {p: label for p, label in self._options.items() if p[: len(path)] != path}
        self._options[path] = option

    def line(self, path: KeyPath) -> int:
        """Line of the nearest thing at or above ``path``; options come before every line."""
        above = self._nearest(path)
        return 0 if above in self._options else self._lines.get(above, 1)

    def error(self, path: KeyPath, problem: str) -> JobError:
        """``problem`` at ``path``, as the user is told of it."""
        above = self._nearest(path)
        label = self._options.get(above) or f"{self._source}:{self.line(path)}"
        key = "" if above == path and path in self._options else dotted(path)
        return one_line(*(part for part in (label, key, problem) if part))

    def _nearest(self, path: KeyPath) -> KeyPath:
        if path not in self._lines:  # perhaps an option made it on its way to a place further down
            below = next((option for option in self._options if option[: len(path)] == path), None)
            if below is not None:
                return below
        known = (path[:length] for length in range(len(path), -1, -1))
        return next((p for p in known if p in self._options or p in self._lines), ())


def one_line(*parts: str) -> JobError:
    """The parts as one line that any terminal can show."""
    text = ": ".join(parts)
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return JobError(line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}...")


def dotted(path: KeyPath) -> str:
    """``methods[1].harp.theta``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def reading_error(source: str, problem: YamlProblem) -> JobError:
    return Origins(source, {problem.path: problem.line}).error(problem.path, problem.problem)


def checking_error(error: ValidationError, job: Any, origins: Origins) -> JobError:
    """The first problem in the file's order; unknown keys before missing ones: often they are one mistake."""
    found = [(_path(details, job), details) for details in error.errors(include_url=False)]
    path, details = min(found, key=lambda item: (_LATE.get(item[1]["type"], 0), origins.line(item[0])))
    return origins.error(path, _problem(details))


# pydantic reports these beside what caused them: a list whose only item is ill-formed is also "too short".
_LATE = {"missing": 1, "too_short": 2, "default_factory_not_called": 3}


def _path(details: ErrorDetails, job: Any) -> KeyPath:
    """pydantic's location without the tags of unions, which are no part of the file."""
    path: KeyPath = ()
    here = job
    for part in details["loc"]:
        if not isinstance(here, dict | list):
            break
        path = (*path, part)
        here = here.get(part) if isinstance(here, dict) else here[int(part)]
    return (*path, *details.get("ctx", {}).get("below", ()))


_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "made of letters, digits, '.', '_' and '-'",
    "union_tag_not_found": "a method's name or one mapping {{method: settings}}",
}


def _problem(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in _WANTED:
        return f"must be {_WANTED[kind].format(**context)}, not {_shown(details['input'])}"
    if kind == "auto_or_number":
        return f"{details['msg']}, not {_shown(details['input'])}"
    if kind == "union_tag_invalid":
        available = context["expected_tags"].replace("'", "")
        return f"method '{context['tag']}' is not available in this version; available: {available}"
    if kind == "missing":
        return "this key is missing"
    if kind == "too_short":
        return "must not be empty"
    return details["msg"]


def _shown(value: Any) -> str:
    """A value as its writer knows it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
