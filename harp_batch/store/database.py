"""Database URLs and the engines behind them."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError

from harp_batch.errors import DatabaseError
from harp_batch.store.types import dumps

Mode = Literal["ro", "rw", "rwc"]  # SQLite's words: read only, read and write, create where missing

BUSY_SECONDS = 30  # how long a locked SQLite file is waited for
CONNECT_SECONDS = 10
# How a server that is gone without a word is noticed: some 8 seconds after the last one. It is then looked for anew,
# for CONNECT_SECONDS.
_TCP = {
    "keepalives_idle": 2,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 8_000,  # milliseconds
}
_EXPECTED = "expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
_POSTGRESQL = {"postgresql", "postgres", "postgresql+psycopg"}


def parse_url(text: str) -> sa.URL:
    """The URL with its driver named; raises DatabaseError where it is not of a kind that is supported."""
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        shown = "it" if "@" in text else repr(text)  # what cannot be parsed may hold a password
        raise DatabaseError(f"the database URL is not valid: {_EXPECTED}, not {shown}") from None
    if url.drivername in _POSTGRESQL:
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise DatabaseError(f"the database {show(url)} is of a kind that is not supported: {_EXPECTED}")
    if not url.database or url.database == ":memory:" or url.query:
        raise DatabaseError(f"the database {show(url)} is not a file: {_EXPECTED}")
    return url


def show(url: sa.URL) -> str:
    """The URL as it may be printed: without its password."""
    return url.render_as_string(hide_password=True)


def is_sqlite(url: sa.URL) -> bool:
    """Whether it is SQLite; PostgreSQL otherwise."""
    return url.get_backend_name() == "sqlite"


def sqlite_path(url: sa.URL) -> Path:
    """The file behind a SQLite URL."""
    return Path(url.database or "").absolute()


def require_folder(path: Path) -> None:
    """Raise DatabaseError where a database file has no folder to be in."""
    if not path.parent.is_dir():
        raise DatabaseError(f"the database file {path} cannot be made: there is no folder {path.parent}")


def connect_sqlite(url: sa.URL, mode: Mode) -> sqlite3.Connection:
    """A connection to the file; raises DatabaseError where there is none and the mode does not make one."""
    path = sqlite_path(url)
    if mode != "rwc" and not path.exists():
        raise DatabaseError(f"the database file {path} does not exist: submit a job first, or give --db")
    require_folder(path)
    return sqlite3.connect(
        f"{path.as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS, check_same_thread=False
    )


def connect_timeout(url: sa.URL) -> int:
    """Seconds to wait for a PostgreSQL server: those of the URL where it says so."""
    asked = str(url.query.get("connect_timeout", ""))
    return int(asked) if asked.isdigit() else CONNECT_SECONDS


def make_engine(url: sa.URL, mode: Mode) -> sa.Engine:
    """An engine for the URL; it connects when it is first used."""
    return _sqlite_engine(url, mode) if is_sqlite(url) else _postgresql_engine(url, mode)


def _sqlite_engine(url: sa.URL, mode: Mode) -> sa.Engine:
    engine = sa.create_engine(
        url, creator=lambda: connect_sqlite(url, mode), json_serializer=dumps, poolclass=sa.QueuePool
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 would begin late and leave DDL outside of transactions
        connection.execute("PRAGMA foreign_keys = ON")
        if mode != "ro":
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writing = connection.get_execution_options().get("writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def writer(engine: sa.Engine) -> sa.Engine:
    """The engine as it is for transactions that write: SQLite's lock is taken before anything is read."""
    return engine.execution_options(writing=True)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch the file to write-ahead logging; two at a time get "locked" at once, without SQLite's own waiting."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgresql_engine(url: sa.URL, mode: Mode) -> sa.Engine:
    return sa.create_engine(
        url,
        connect_args={"connect_timeout": connect_timeout(url)}
        | {name: value for name, value in _TCP.items() if name not in url.query},
        json_serializer=dumps,
        pool_pre_ping=True,  # a server that was restarted costs one commit, not the run
        execution_options={"postgresql_readonly": mode == "ro"},
    )
