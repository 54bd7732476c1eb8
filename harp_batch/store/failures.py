"""A database driver's error as one of ours: whose fault it is, and whether another try may help."""

from __future__ import annotations

import sqlite3

import psycopg
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from harp_batch.errors import DatabaseError, StoreFull, StoreUnavailable
from harp_batch.store.database import show

# psycopg's own too: SQLAlchemy lets some of a dying connection's errors through as they are.
DRIVER_ERRORS = (DBAPIError, psycopg.Error)

_NO_FIT_SQLITE = {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG}
_UNUSABLE_SQLITE = {
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_ERROR,  # a table is missing
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
# Classes of SQLSTATE, and single ones.
_NO_FIT_POSTGRESQL = ("22", "23", "54")  # data, constraints, limits of the program
_UNUSABLE_POSTGRESQL = ("25006", "28", "3D", "3F", "42")  # read-only, passwords, names, rights
_DISK_FULL = "53100"


def understood(url: sa.URL, error: DBAPIError | psycopg.Error) -> Exception:
    """What to raise in the error's place.

    ValueError for values that do not fit, DatabaseError for a database that answers and cannot be used, StoreFull
    for a full disk, and StoreUnavailable for all that may pass.
    """
    cause = error.orig if isinstance(error, DBAPIError) else error
    kind = _kind_sqlite(cause) if isinstance(cause, sqlite3.Error) else _kind_postgresql(cause)
    reason = one_line(error)
    if kind is ValueError:
        return ValueError(f"what was to be stored does not fit the database: {reason}")
    if kind is StoreFull:
        return StoreFull(
            f"the disk of the database {show(url)} is full ({reason}): make room there, then resume the run"
        )
    if kind is DatabaseError:
        return unusable(url, error)
    return StoreUnavailable(f"the database {show(url)} does not answer: {reason}")


def unusable(url: sa.URL, error: DBAPIError | psycopg.Error) -> DatabaseError:
    """The driver's error as one sentence."""
    return DatabaseError(f"the database {show(url)} cannot be used: {one_line(error)}")


def one_line(error: DBAPIError | psycopg.Error) -> str:
    """The driver's own words."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return " ".join(str(cause).split()) or type(cause).__name__


def _kind_sqlite(cause: sqlite3.Error) -> type[Exception]:
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # without the details; Python's own errors have none
    if code == sqlite3.SQLITE_FULL:
        return StoreFull
    if code in _NO_FIT_SQLITE or isinstance(cause, sqlite3.DataError | sqlite3.IntegrityError):
        return ValueError
    if code in _UNUSABLE_SQLITE or isinstance(cause, sqlite3.ProgrammingError):
        return DatabaseError
    return StoreUnavailable


def _kind_postgresql(cause: BaseException | None) -> type[Exception]:
    """By SQLSTATE; what the driver says by itself has none and is about the connection, or about a value."""
    state = getattr(cause, "sqlstate", None) or ""
    if state == _DISK_FULL:
        return StoreFull
    if state.startswith(_NO_FIT_POSTGRESQL) or (not state and isinstance(cause, psycopg.DataError)):
        return ValueError
    return DatabaseError if state.startswith(_UNUSABLE_POSTGRESQL) else StoreUnavailable
