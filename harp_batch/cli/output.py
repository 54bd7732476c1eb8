"""Rows to stdout: a table for people, JSON or CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from harp_batch.cli.failures import stop_writing

Rows = Sequence[Sequence[Any]]
UNDEFINED = "-"


def write_rows(columns: Sequence[str], rows: Rows, style: str) -> None:
    """Write rows of raw values as ``style``: table, json or csv."""
    render = {"table": text_table, "json": json_text, "csv": csv_text}[style]
    write(render(columns, rows))


def write(text: str) -> None:
    """Print to stdout; a reader that has seen enough (``| head``) is no error."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        stop_writing()


def text_table(columns: Sequence[str], rows: Rows, right: Container[str] = ()) -> str:
    """An aligned table; a terminal's width folds it, a pipe gets one line a row.

    Numbers are aligned to the right, and so are the columns named in ``right``.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        numeric = name in right or any(_is_number(row[index]) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    buffer = io.StringIO()
    width = None if sys.stdout.isatty() else 1_000_000
    Console(file=buffer, width=width, no_color=True, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def json_text(columns: Sequence[str], rows: Rows) -> str:
    """A JSON array of one object a row; NaN and infinities are null."""
    names = _distinct(columns)
    records = [dict(zip(names, map(_json_value, row), strict=True)) for row in rows]
    return json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False)


def csv_text(columns: Sequence[str], rows: Rows) -> str:
    """CSV with a header, one ``\\n`` after each record; undefined values are empty."""
    return "".join(_csv_line(record) for record in [columns, *rows])


def cell(value: Any) -> str:
    """One value on one line: control characters of a model's text never reach the terminal."""
    if value is None:
        return UNDEFINED
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(_json_value(value)) if not isinstance(value, str) else value
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _json_value(value: Any) -> Any:
    """The nearest JSON value of what a database driver hands out."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case datetime() | date():
            return value.isoformat()
        case bytes() | memoryview():
            return bytes(value).hex()
        case Mapping():
            return {str(k): _json_value(v) for k, v in value.items()}
        case list() | tuple():
            return [_json_value(v) for v in value]
    return str(value)


def _csv_line(record: Sequence[Any]) -> str:
    """Written with ``\\r\\n``, because only then does Python quote a carriage return inside a text."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(map(_csv_value, record))
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _csv_value(value: Any) -> Any:
    plain = _json_value(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, bool | list | dict) else plain


def _distinct(columns: Iterable[str]) -> list[str]:
    """Column names as object keys: the second ``n`` becomes ``n_2``, so that no value is lost."""
    names: list[str] = []
    for column in columns:
        name, count = column, 1
        while name in names:
            count += 1
            name = f"{column}_{count}"
        names.append(name)
    return names
