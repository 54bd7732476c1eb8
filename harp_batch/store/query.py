"""Somebody's SQL, run so that it can only read: the sandbox behind `harp-batch query`."""

from __future__ import annotations

import difflib
import re
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

import psycopg
import sqlalchemy as sa

from harp_batch.errors import DatabaseError, QueryError
from harp_batch.store import migrate
from harp_batch.store.database import connect_sqlite, connect_timeout, is_sqlite, parse_url, show
from harp_batch.store.deadline import within
from harp_batch.store.types import clean
from harp_batch.store.views import VIEWS

MAX_BYTES = 64 * 2**20  # of text in one result: a few long rows must not fill the memory either
_MAX_VALUE_BYTES = 4 * 2**20  # in SQLite; what is stored, traces of the longest answers too, is shorter
_CANCEL_SECONDS = 2  # to reach a server that may be gone
_READING = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_SKIPPED = re.compile(r"(?:\s|\(|--[^\n]*(?:\n|$)|/\*.*?\*/)*", re.DOTALL)
_POWERS = """
    SELECT string_agg(rolname, ', ' ORDER BY rolname) FROM pg_roles
    WHERE pg_has_role(session_user, oid, 'MEMBER') AND (rolsuper OR rolname LIKE 'pg\\_%\\_server\\_%')
"""  # files and programs of the server
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
    DatabaseError for a database that cannot be read, or only as a superuser of PostgreSQL.
    """
    migrate.require_current(url)
    parsed = parse_url(url)
    _require_reading(sql, "SELECT, WITH or VALUES" if is_sqlite(parsed) else "SELECT, WITH, VALUES or TABLE")
    ask = _ask_sqlite if is_sqlite(parsed) else _ask_postgresql
    try:
        return ask(parsed, sql, max_rows, timeout_s)
    except (TimeoutError, psycopg.errors.QueryCanceled):
        raise QueryError(
            f"the query was stopped after {timeout_s:g} seconds: narrow it or add a LIMIT"
        ) from None
    except (sqlite3.Error, sqlite3.Warning, psycopg.Error) as error:
        raise _refusal(str(error)) from None
    except (ValueError, RecursionError) as error:  # a value that Python cannot hold, as a number in JSON
        raise QueryError(f"the query's result cannot be read: {_one_line(str(error))}") from None


def _require_reading(sql: str, words: str) -> None:
    start = _SKIPPED.match(sql)
    word = re.match(r"\w*", sql[start.end() if start else 0 :])
    if word is None or not word[0] or word[0].upper() not in re.findall("[A-Z]+", words):
        raise QueryError(f"only one statement that reads is run: begin it with {words}")
    if clean(sql) != sql:
        raise QueryError("the query is not text: it has a NUL character or bytes that are not UTF-8")


def _ask_sqlite(url: sa.URL, sql: str, max_rows: int, timeout_s: float) -> QueryResult:
    connection = connect_sqlite(url, "ro")

    def ask() -> QueryResult:
        with closing(connection):
            _confine(connection)
            cursor = connection.execute(sql)
            columns = tuple(column[0] for column in cursor.description)
            return _collect(columns, cursor, max_rows)

    def stop() -> None:
        with suppress(sqlite3.Error):  # closed by now
            connection.interrupt()

    return within(timeout_s, ask, stop)


def _confine(connection: sqlite3.Connection) -> None:
    """Leave nothing but reading: no writes, no other files, no settings, no values that fill the memory."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
    connection.set_authorizer(_authorize)


def _authorize(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


def _ask_postgresql(url: sa.URL, sql: str, max_rows: int, timeout_s: float) -> QueryResult:
    connection = _connect_postgresql(url)

    def ask() -> QueryResult:
        with closing(connection):  # rolls back
            _require_plain_role(connection)
            _limit_time(connection, timeout_s)
            return _fetch(connection, sql, max_rows)

    def stop() -> None:  # the server's own timeout can be set by a function of the query
        with suppress(psycopg.Error):
            connection.cancel_safe(timeout=_CANCEL_SECONDS)

    return within(timeout_s, ask, stop)


def _connect_postgresql(url: sa.URL) -> psycopg.Connection[tuple[Any, ...]]:
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        connection = psycopg.connect(conninfo, connect_timeout=connect_timeout(url))
    except psycopg.OperationalError as error:
        raise DatabaseError(f"the database {show(url)} cannot be used: {_one_line(str(error))}") from None
    connection.read_only = True
    return connection


def _require_plain_role(connection: psycopg.Connection[tuple[Any, ...]]) -> None:
    """A transaction that only reads does not keep a superuser from the server's files, nor does any role it
    is given for the while: set_config('role', ...) undoes that from within a query."""
    found = connection.execute(_POWERS).fetchone()
    if found and found[0]:
        raise DatabaseError(
            f"no query is run as {connection.info.user}, which has the rights of {found[0]} on the whole server:"
            " give --db a role that can only read, which docs/querying.md shows how to make"
        )


def _limit_time(connection: psycopg.Connection[Any], timeout_s: float) -> None:
    connection.execute(f"SET LOCAL statement_timeout = {max(1, round(timeout_s * 1000))}")


def _fetch(connection: psycopg.Connection[Any], sql: str, max_rows: int) -> QueryResult:
    """Through a server-side cursor: one statement, a reading one, whose rows come as they are asked for."""
    with connection.cursor(name="harp_batch_query") as cursor:
        cursor.execute(sql.encode())  # bytes: psycopg's types want text to be a literal
        columns = tuple(column.name for column in cursor.description or ())
        return _collect(columns, cursor, max_rows)


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
        return _number(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _number(value: Decimal) -> int | float | str:
    """Text where a float would be infinite, and Python refuse to print the int."""
    if not value.is_finite():
        return float(value)
    if value.adjusted() > sys.float_info.max_10_exp:
        return str(value)
    return int(value) if value == value.to_integral_value() else float(value)


def _refusal(message: str) -> QueryError:
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
