"""Imports point one way, and each heavy library lives in its own corner (read from the syntax trees)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "harp_batch"

# A part may import itself and parts of a lower layer.
LAYERS = (
    {"errors", "records", "cache", "place"},
    {"job", "models", "tasks", "decode", "store", "analysis"},
    {"cluster", "report"},
    {"service"},
    {"cli"},
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}

# Where a library may be imported; nowhere else.
HOMES = {
    "alembic": ("store",),
    "click": ("cli",),
    "jinja2": ("report", "tasks"),  # the errors of prompt and chat templates are jinja2's
    "lm_eval": ("tasks",),
    "ray": ("cluster.driver", "cluster.jobs"),
    "rich": ("cli",),
    "sqlalchemy": ("store",),
    "torch": ("decode", "models"),
    "transformers": ("decode", "models"),
}


def imports(source: str, module: str) -> Iterator[str]:
    """Absolute dotted names that a module imports anywhere, function bodies included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = ["harp_batch", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*parents, *(node.module or "").split(".")]).strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def breaches(source: str, module: str) -> list[str]:
    """What the module (``store.query``) imports against the rules."""
    part = module.split(".")[0]
    found = []
    for name in imports(source, module):
        top, *rest = name.split(".")
        if top == "harp_batch":
            found += _against_the_direction(part, rest[0])
        elif top in HOMES and not any(f"{module}.".startswith(f"{home}.") for home in HOMES[top]):
            found.append(f"{module} imports {top}, which belongs in {' and '.join(HOMES[top])}")
    return found


def _against_the_direction(part: str, other: str) -> list[str]:
    if other == part or other not in LAYER_OF or LAYER_OF[other] < LAYER_OF[part]:
        return []
    return [f"{part} imports {other}, which is not below it"]


def modules() -> dict[str, Path]:
    """Dotted name below harp_batch -> file."""
    files = (f for f in PACKAGE.rglob("*.py") if f.parent != PACKAGE or f.name != "__init__.py")
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}


def test_every_part_has_a_layer() -> None:
    assert {name.split(".")[0] for name in modules()} - {"testing"} <= set(LAYER_OF)


@pytest.mark.parametrize("module", [name for name in modules() if not name.startswith("testing")])
def test_module_keeps_the_rules(module: str) -> None:
    assert breaches(modules()[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors", "from harp_batch.records import Answer"),
        ("store.query", "import harp_batch.service"),
        ("store.query", "from ..cluster import driver"),
        ("store.query", "from harp_batch import cli"),
        ("decode.engine", "def f():\n    import ray"),
        ("cluster.dispatcher", "import ray.util"),
        ("service", "from sqlalchemy.orm import Session"),
        ("tasks_extra", "import lm_eval"),
    ],
)
def test_checker_sees_a_breach(module: str, line: str) -> None:
    assert breaches(line, module)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("store.query", "from . import views"),
        ("store.query", "from harp_batch.records import Answer"),
        ("cluster.driver", "import ray"),
        ("models", "from transformers import AutoConfig"),
        ("cli.submit", "from harp_batch.service import submit"),
    ],
)
def test_checker_allows_the_rules(module: str, line: str) -> None:
    assert breaches(line, module) == []
