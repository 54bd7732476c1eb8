"""Figures and ratios as a table for people, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.decoding.turns import Figure

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A comparison, and the value that it should have."""

    name: str
    value: float | None  # None: one of its sides did not run
    goal: float | None = None
    at_most: bool = False  # the goal is an upper limit

    @property
    def verdict(self) -> str:
        """Whether the goal is reached: ``yes``, ``no``, ``undefined``, or nothing where there is no goal."""
        if self.goal is None:
            return ""
        if self.value is None:
            return "undefined"
        return "yes" if (self.value <= self.goal if self.at_most else self.value >= self.goal) else "no"


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of the benchmark found."""

    title: str
    workload: dict[str, Any]
    figures: tuple[Figure, ...]
    ratios: tuple[Ratio, ...]
    notes: tuple[str, ...] = field(default=())


def quotient(above: float | None, below: float | None) -> float | None:
    """above / below; None where either is missing or there is nothing to divide by."""
    return above / below if above is not None and below else None


def best(figures: Sequence[Figure]) -> float | None:
    """The highest value; None where none of them ran."""
    return max((f.value for f in figures if f.value is not None), default=None)


def value_of(figures: Sequence[Figure], name: str) -> float | None:
    """The value of the figure of that name; None where there is none."""
    return next((f.value for f in figures if f.name == name), None)


def as_json(machine: dict[str, Any], parts: Sequence[Part], caveat: str) -> dict[str, Any]:
    """Everything that was found, every round included."""
    return {
        "machine": machine,
        "caveat": caveat,
        "parts": [
            {
                "title": part.title,
                "workload": part.workload,
                "figures": [_figure_json(figure) for figure in part.figures],
                "ratios": [_ratio_json(ratio) for ratio in part.ratios],
                "notes": list(part.notes),
            }
            for part in parts
        ],
    }


def _figure_json(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "unit": figure.unit,
        "median": figure.value,
        "rounds": list(figure.rounds),
        "work": figure.work,
        "hesitation_rate": figure.hesitation_rate,
        "not_run": figure.missing,
    }


def _ratio_json(ratio: Ratio) -> dict[str, Any]:
    limit = {"at_most" if ratio.at_most else "at_least": ratio.goal} if ratio.goal is not None else {}
    return {"name": ratio.name, "value": ratio.value, **limit, "reached": ratio.verdict or None}


def as_markdown(machine: dict[str, Any], parts: Sequence[Part], caveat: str) -> str:
    """A page: the machine, all ratios beside their goals, then every part's figures."""
    blocks = [_listing(machine)]
    if caveat:
        blocks.append(caveat)
    blocks.append(_markdown_table(*_goal_rows(parts)))
    for part in parts:
        blocks += [f"### {part.title}", _listing(part.workload), _markdown_table(*_figure_rows(part))]
        blocks += part.notes
    return "\n\n".join(blocks) + "\n"


def as_text(machine: dict[str, Any], parts: Sequence[Part], caveat: str) -> str:
    """The same for a terminal."""
    blocks = [_listing(machine)]
    for part in parts:
        blocks += [f"{part.title}: {_listing(part.workload)}", _text_table(*_figure_rows(part)), *part.notes]
    if caveat:
        blocks.append(caveat)
    blocks.append(_text_table(*_goal_rows(parts)))
    return "\n\n".join(blocks)


def _listing(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _goal_rows(parts: Sequence[Part]) -> tuple[Row, list[Row]]:
    """Every ratio; those with a goal first, in their parts' order."""
    ratios = [ratio for part in parts for ratio in part.ratios]
    ratios.sort(key=lambda ratio: ratio.goal is None)
    return ("ratio", "measured", "goal", "reached"), [
        (r.name, "not run" if r.value is None else f"{r.value:.2f}", _goal(r), r.verdict) for r in ratios
    ]


def _goal(ratio: Ratio) -> str:
    if ratio.goal is None:
        return ""
    return f"at {'most' if ratio.at_most else 'least'} {ratio.goal:g}"


def _figure_rows(part: Part) -> tuple[Row, list[Row]]:
    head: Row = ("contender", "median", "unit", "of rounds", "work")
    reframing = any(figure.hesitation_rate is not None for figure in part.figures)
    rows = [tuple(_figure_cells(figure, reframing)) for figure in part.figures]
    return ((*head, "hesitation rate") if reframing else head), rows


def _figure_cells(figure: Figure, reframing: bool) -> Iterator[str]:
    yield figure.name
    yield "" if figure.value is None else _three_digits(figure.value)
    yield figure.unit
    yield ", ".join(_three_digits(rate) for rate in figure.rounds)
    yield f"not run: {figure.missing}" if figure.missing else figure.work
    if reframing:
        yield "" if figure.hesitation_rate is None else f"{figure.hesitation_rate:.3f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _markdown_table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def _text_table(head: Row, rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
