"""Brings a database to the schema of this version, and says where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from harp_batch.errors import DatabaseError
from harp_batch.store.database import (
    Mode,
    is_sqlite,
    make_engine,
    parse_url,
    require_folder,
    show,
    sqlite_path,
)
from harp_batch.store.failures import DRIVER_ERRORS, unusable

VERSION_TABLE = "harp_batch_version"  # not Alembic's default: a database may be shared with other programs
_LOCK = 0x68617270  # an advisory lock of PostgreSQL: two first submits must not both create the tables
_PACKAGE = Path(__file__).resolve().parents[1]


class SchemaState(StrEnum):
    """Where a database stands against this version of harp-batch."""

    EMPTY = "empty"
    CURRENT = "current"
    BEHIND = "behind"
    NEWER = "newer"


def upgrade(url: str) -> SchemaState:
    """Migrate to the newest schema, creating a missing SQLite file; returns where the database stood before.

    Raises DatabaseError where the database cannot be reached, is newer or holds tables of somebody else.
    """
    with _connection(parse_url(url), "rwc") as connection:
        _lock(connection)
        before = _state(connection)
        if before is SchemaState.NEWER:
            raise DatabaseError(_advice(connection.engine.url, before))
        command.upgrade(_config(connection), "head")
        return before


def ensure(url: str) -> None:
    """Migrate a missing or empty database; raise DatabaseError for one that is not this version's."""
    with _connection(parse_url(url), "rwc") as connection:
        _lock(connection)
        state = _state(connection)
        if state is SchemaState.EMPTY:
            command.upgrade(_config(connection), "head")
        elif state is not SchemaState.CURRENT:
            raise DatabaseError(_advice(connection.engine.url, state))


def downgrade(url: str, revision: str) -> None:
    """Go back to a revision (or "base"), which drops what later ones added."""
    with _connection(parse_url(url), "rw") as connection:
        _lock(connection)
        command.downgrade(_config(connection), revision)


def check(url: str) -> SchemaState:
    """Where the database stands; raises DatabaseError where it cannot be reached."""
    with _connection(parse_url(url), "ro") as connection:
        return _state(connection)


def require_current(url: str) -> None:
    """Raise DatabaseError, with the command that mends it, unless the schema is this version's."""
    state = check(url)
    if state is not SchemaState.CURRENT:
        raise DatabaseError(_advice(parse_url(url), state))


def require_usable(url: str) -> None:
    """Raise DatabaseError unless a run can be stored here now or after `ensure`; makes nothing."""
    parsed = parse_url(url)
    if is_sqlite(parsed) and not sqlite_path(parsed).exists():
        require_folder(sqlite_path(parsed))
        return
    state = check(url)
    if state not in (SchemaState.EMPTY, SchemaState.CURRENT):
        raise DatabaseError(_advice(parsed, state))


def _advice(url: sa.URL, state: SchemaState) -> str:
    what = {
        SchemaState.EMPTY: "has no runs yet: submit a job first, or give another --db",
        SchemaState.BEHIND: "has an older schema: run `harp-batch db upgrade`",
        SchemaState.NEWER: "has a newer schema than this harp-batch knows: upgrade harp-batch",
    }
    return f"the database {show(url)} {what[state]}"


@contextmanager
def _connection(url: sa.URL, mode: Mode) -> Iterator[sa.Connection]:
    engine = make_engine(url, mode)
    try:
        with engine.begin() as connection:
            yield connection
    except DRIVER_ERRORS as error:
        raise unusable(url, error) from error
    finally:
        engine.dispose()


def _lock(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    else:  # nothing was read yet: begin once more, with SQLite's lock
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _state(connection: sa.Connection) -> SchemaState:
    revision = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE}
    ).get_current_revision()
    scripts = ScriptDirectory.from_config(_config(connection))
    if revision is None:
        return SchemaState.EMPTY
    if revision == scripts.get_current_head():
        return SchemaState.CURRENT
    known = {script.revision for script in scripts.walk_revisions()}
    return SchemaState.BEHIND if revision in known else SchemaState.NEWER


def _config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.attributes.update(connection=connection, version_table=VERSION_TABLE)
    return config


def _migrations() -> Path:
    """The folder of revisions: beside the code in an installed wheel, in db/ in a checkout."""
    installed = _PACKAGE / "_migrations"
    return installed if installed.is_dir() else _PACKAGE.parent / "db" / "migrations"
