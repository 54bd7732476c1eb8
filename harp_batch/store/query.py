"""Somebody's SQL, run so that it can only read: the sandbox behind `harp-batch query`."""

from __future__ import annotations

import difflib
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

import psycopg
import sqlalchemy as sa

from harp_batch.errors import DatabaseError, QueryError
from harp_batch.store import migrate
from harp_batch.store.database import connect_sqlite, connect_timeout, is_sqlite, parse_url, show
from harp_batch.store.views import VIEWS

MAX_BYTES = 64 * 2**20  # of text in one result: a few long rows must not fill the memory either
_MAX_VALUE_BYTES = MAX_BYTES  # of text that SQLite makes
_READING = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_PROGRESS_STEPS = 10_000  # of SQLite's virtual machine: well under a millisecond
_SKIPPED = re.compile(r"(?:\s|\(|--[^\n]*(?:\n|$)|/\*.*?\*/)*", re.DOTALL)
_FIRST_WORDS = {"select", "with", "values", "table"}
_UNKNOWN_NAME = re.compile(
    r"no such (?:column|table): (?P<sqlite>\S+)"
    r"|(?:column|relation) \"?(?P<postgresql>[^\s\"]+)\"? does not exist"
)


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The rows of a query."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    truncated: bool  # there was more than was asked for


def run_query(url: str, sql: str, max_rows: int = 10_000, timeout_s: float = 30) -> QueryResult:
    """Run one reading statement and return at most ``max_rows`` of its rows.

    Raises QueryError for SQL that is wrong, could write or takes longer than ``timeout_s`` seconds, and
    DatabaseError for a database that cannot be read.
    """
    migrate.require_current(url)
    _require_reading(sql)
    parsed = parse_url(url)
    ask = _ask_sqlite if is_sqlite(parsed) else _ask_postgresql
    return ask(parsed, sql, max_rows, timeout_s)


def _require_reading(sql: str) -> None:
    start = _SKIPPED.match(sql)
    word = re.match(r"\w*", sql[start.end() if start else 0 :])
    if word is None or word[0].lower() not in _FIRST_WORDS:
        raise QueryError("only one statement that reads is run: begin it with SELECT, WITH, VALUES or TABLE")


def _ask_sqlite(url: sa.URL, sql: str, max_rows: int, timeout_s: float) -> QueryResult:
    connection = connect_sqlite(url, "ro")
    try:
        _confine(connection, timeout_s)
        cursor = connection.execute(sql)
        columns = tuple(column[0] for column in cursor.description)
        return _collect(columns, cursor, max_rows)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise _refusal(str(error), stopped=str(error) == "interrupted", timeout_s=timeout_s) from None
    finally:
        connection.close()


def _confine(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Leave nothing but reading: no writes, no other files, no settings, and an end to it."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
    connection.set_authorizer(_authorize)
    connection.set_progress_handler(_deadline(timeout_s), _PROGRESS_STEPS)


def _authorize(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


def _deadline(timeout_s: float) -> Callable[[], bool]:
    end = time.monotonic() + timeout_s
    return lambda: time.monotonic() > end


def _ask_postgresql(url: sa.URL, sql: str, max_rows: int, timeout_s: float) -> QueryResult:
    connection = _connect_postgresql(url)
    try:
        _enter_read_only(connection, timeout_s)
        return _fetch(connection, sql, max_rows, _deadline(timeout_s))
    except psycopg.errors.QueryCanceled as error:
        raise _refusal(str(error), stopped=True, timeout_s=timeout_s) from None
    except psycopg.Error as error:
        raise _refusal(str(error), stopped=False, timeout_s=timeout_s) from None
    finally:
        connection.close()  # rolls back


def _connect_postgresql(url: sa.URL) -> psycopg.Connection[tuple[Any, ...]]:
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        return psycopg.connect(conninfo, connect_timeout=connect_timeout(url))
    except psycopg.OperationalError as error:
        raise DatabaseError(f"the database {show(url)} cannot be used: {_one_line(str(error))}") from None


def _enter_read_only(connection: psycopg.Connection[Any], timeout_s: float) -> None:
    connection.read_only = True
    connection.execute(f"SET LOCAL statement_timeout = {max(1, round(timeout_s * 1000))}")
    superuser = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
    if superuser == (True,):  # could read the server's files and stop its processes: become one that cannot
        connection.execute("SET LOCAL ROLE pg_read_all_data")


def _fetch(
    connection: psycopg.Connection[Any], sql: str, max_rows: int, late: Callable[[], bool]
) -> QueryResult:
    """Through a server-side cursor: one statement, a reading one, whose rows come as they are asked for."""
    with connection.cursor(name="harp_batch_query") as cursor:
        cursor.execute(sql.encode())  # bytes: psycopg's types want text to be a literal
        columns = tuple(column.name for column in cursor.description or ())
        return _collect(columns, _until(late, cursor), max_rows)


def _until(late: Callable[[], bool], rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    for row in rows:
        if late():
            raise psycopg.errors.QueryCanceled("too late")
        yield row


def _collect(columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]], max_rows: int) -> QueryResult:
    kept: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if len(kept) == max_rows or size > MAX_BYTES:
            return QueryResult(columns, tuple(kept), truncated=True)
        kept.append(tuple(map(_plain, row)))
    return QueryResult(columns, tuple(kept), truncated=False)


def _plain(value: Any) -> Any:
    """The value as both back ends give it: PostgreSQL's sums and means are Decimals."""
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    if isinstance(value, date):
        return value.isoformat()
    return value


def _refusal(message: str, *, stopped: bool, timeout_s: float) -> QueryError:
    if stopped:
        return QueryError(f"the query was stopped after {timeout_s:g} seconds: narrow it or add a LIMIT")
    unknown = _UNKNOWN_NAME.search(message)
    hint = _hint(unknown["sqlite"] or unknown["postgresql"]) if unknown else ""
    return QueryError(f"the query was refused: {_one_line(message)}{hint}")


def _hint(name: str) -> str:
    """What there is instead of the unknown column or table."""
    last = name.rpartition(".")[2]
    known = {*VIEWS, *(column for columns in VIEWS.values() for column in columns)}
    near = difflib.get_close_matches(last, known, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"; {meant}the views are {', '.join(VIEWS)}"


def _one_line(message: str) -> str:
    return message.strip().partition("\n")[0]
