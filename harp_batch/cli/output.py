"""Rows to stdout: a table for people, JSON or CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from harp_batch.cli.failures import stop_writing

if TYPE_CHECKING:
    from rich.box import Box
    from rich.table import Table

Rows = Sequence[Sequence[Any]]
UNDEFINED = "-"
FOLDED = 60  # columns of the terminal; only longer text is folded, and never to less
GAP = 2  # between two columns of a table
UNLIMITED = 1_000_000


def write_rows(columns: Sequence[str], rows: Rows, style: str) -> None:
    """Write rows of raw values as ``style``: table, json or csv."""
    if style == "table":
        write(text_table(columns, rows, width=terminal_width()))
    else:
        write({"json": json_text, "csv": csv_text}[style](columns, rows))


def write(text: str) -> None:
    """Print to stdout; a reader that has seen enough (``| head``) is no error."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        stop_writing()


def escape_what_cannot_be_encoded() -> None:
    """A terminal or locale without Unicode gets ``\\xe9`` for what it cannot show, not a failure."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def text_table(
    columns: Sequence[str], rows: Rows, right: Container[str] = (), width: int | None = None
) -> str:
    """An aligned table, one line a row; only long text folds, and only to come down to ``width``.

    Numbers are aligned to the right, and so are the columns named in ``right``.
    """
    from rich.console import Console
    from rich.text import Text

    shown = [[cell(value) for value in row] for row in rows]
    longest = [max(Text(text).cell_len for text in column) for column in zip(columns, *shown, strict=True)]
    numeric = [
        name in right or any(_is_number(row[index]) for row in rows) for index, name in enumerate(columns)
    ]
    table = _empty_table(columns, numeric, longest)
    for row in shown:
        table.add_row(*map(Text, row))
    least = sum(min(room, FOLDED) + GAP for room in longest) - GAP
    console = Console(
        file=io.StringIO(), width=max(width or UNLIMITED, least), no_color=True, emoji=False, highlight=False
    )
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _empty_table(columns: Sequence[str], numeric: Sequence[bool], longest: Sequence[int]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=_box(), padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for name, is_numeric, room in zip(columns, numeric, longest, strict=True):
        table.add_column(
            Text(name),
            justify="right" if is_numeric else "left",
            overflow="fold",
            no_wrap=room <= FOLDED,
            min_width=min(room, FOLDED),
        )
    return table


def _box() -> Box:
    """A rule below the header, in what stdout can show."""
    from rich.box import SIMPLE_HEAD, Box

    if _stdout_has_unicode():
        return SIMPLE_HEAD
    return Box(str(SIMPLE_HEAD).replace("\N{BOX DRAWINGS LIGHT HORIZONTAL}", "-"), ascii=True)


def _stdout_has_unicode() -> bool:
    return (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def json_text(columns: Sequence[str], rows: Rows) -> str:
    """A JSON array of one object a row; NaN and infinities are null."""
    names = _distinct(columns)
    records = [dict(zip(names, map(_json_value, row), strict=True)) for row in rows]
    return json.dumps(records, indent=2, ensure_ascii=not _stdout_has_unicode(), allow_nan=False)


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
