"""Strict reading of YAML: plain values, and the line that each of them stands on.

The scalars are those of YAML 1.2's core schema, so ``1e-3`` is a number and ``no`` is text. Duplicate keys,
anchors, aliases, tags, keys that are not text and deep nesting are refused: none of them has a place in a job
file, and each can make it mean something else than what it seems to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

KeyPath = tuple[str | int, ...]

MAX_NESTING = 20

MAX_DIGITS = 100  # of a whole number; far more than any key takes, and few enough to be shown
_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_STR = "tag:yaml.org,2002:str"
CORE_SCALARS = {
    _NULL: re.compile(r"(?:~|null|Null|NULL|)$"),
    _BOOL: re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
    _INT: re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    _FLOAT: re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}


class YamlProblem(Exception):
    """Why a text was refused: ``problem`` at ``path``, on 1-based ``line``."""

    def __init__(self, problem: str, path: KeyPath, line: int) -> None:
        super().__init__(problem)
        self.problem, self.path, self.line = problem, path, line


@dataclass(frozen=True)
class Document:
    """A text that was read: its value, and for every path in it the 1-based line of its key or list item."""

    value: Any
    lines: dict[KeyPath, int]


class _Resolver(BaseResolver):
    """Core-schema scalars; anything else is text."""


for _tag, _pattern in CORE_SCALARS.items():
    _Resolver.add_implicit_resolver(_tag, _pattern, None)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """Text to node tree; refuses what a job file has no use for while the tree grows."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)
        self._depth = 0
        self._path: KeyPath = ()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        outer = self._path
        self._path = (*outer, *_step(index))
        self._check(self.peek_event())  # type: ignore[no-untyped-call]
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._path = outer
            self._depth -= 1

    def _check(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self._refuse("anchors and aliases (& and *) are not allowed; write the value out", event)
        if getattr(event, "tag", None) is not None:
            self._refuse("tags (!) are not allowed; write the plain value", event)
        if self._depth >= MAX_NESTING and isinstance(event, yaml.CollectionStartEvent):
            self._refuse(f"nested deeper than {MAX_NESTING} levels", event)

    def _refuse(self, problem: str, event: yaml.Event) -> NoReturn:
        raise YamlProblem(problem, self._path, event.start_mark.line + 1 if event.start_mark else 1)


def _step(index: Any) -> KeyPath:
    """The composer's index as a step of a path: a list's number, a value's key; a key itself has none."""
    if isinstance(index, yaml.ScalarNode):
        return (index.value,)
    return (index,) if isinstance(index, int) else ()


def read_yaml(text: str) -> Document:
    """The one value that ``text`` holds; raises :class:`YamlProblem`."""
    try:
        node = _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlProblem(f"character U+{ord(text[error.position]):04X} is not allowed", (), line) from error
    except yaml.MarkedYAMLError as error:
        raise _syntax_problem(error) from error
    except (ValueError, OverflowError) as error:
        raise YamlProblem("not valid YAML: an escape names no character", (), 1) from error
    if node is None:
        return Document(None, {(): 1})
    lines: dict[KeyPath, int] = {(): _line(node)}
    return Document(_value(node, (), lines), lines)


def _syntax_problem(error: yaml.MarkedYAMLError) -> YamlProblem:
    mark = error.problem_mark or error.context_mark
    problem = " ".join(str(error.problem or error.context).split())
    if "expected a single document" in f"{error.context}":
        problem = "a second document (---) starts here; one file holds one job"
    elif "'\\t'" in problem:
        problem = "a tab where only spaces may indent"
    return YamlProblem(f"not valid YAML: {problem}", (), mark.line + 1 if mark else 1)


def _value(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    """Plain value of ``node``; ``lines`` gains an entry for everything inside it."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = _line(item)
        return [_value(item, (*path, index), lines) for index, item in enumerate(node.value)]
    try:
        return _scalar(node)
    except ValueError as error:
        raise YamlProblem("this number is too long", path, _line(node)) from error


def _mapping(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR:
            raise YamlProblem("a key must be text", path, _line(key_node))
        key = key_node.value
        key_path = (*path, key)
        if key in result:
            raise YamlProblem(
                f"duplicate key; line {lines[key_path]} has it already", key_path, _line(key_node)
            )
        lines[key_path] = _line(key_node)
        result[key] = _value(value_node, key_path, lines)
    return result


def _scalar(node: yaml.Node) -> Any:
    text: str = node.value
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        if len(text) > MAX_DIGITS:
            raise ValueError("too long to be shown")
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if node.tag == _FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1 if node.start_mark else 1
