"""What the database says, read from outside of harp-batch while a run goes on and when it has ended."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

Key = tuple[Any, ...]  # (model, task, method, doc_id, repeat)
Rows = Mapping[Key, tuple[Any, ...]]

_KEY = ("model", "task", "method", "doc_id", "repeat")
# `seconds` is a measured time: an answer that was decoded again has another one.
_REST = ("text", "correct", "finish_reason", "output_tokens", "forward_tokens", "seconds", "error")
_TOKENS = _REST.index("output_tokens")


class Watcher:
    """Reads the database of one run; never writes."""

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)
        self._engine = _read_only(self._url)

    def count(self) -> int | None:
        """How many answers are committed; None while the database does not answer or is not there yet."""
        try:
            with self._engine.connect() as connection:
                return int(connection.execute(sa.text("SELECT count(*) FROM answers")).scalar_one())
        except DBAPIError:
            return None

    def fetch(self) -> list[tuple[Any, ...]]:
        """Every committed answer: its key, then the rest."""
        columns = ", ".join(_KEY + _REST)
        with self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(f"SELECT {columns} FROM answers"))]

    def decoding(self) -> set[int]:
        """Process ids of the actors that decode, as the driver said some two seconds ago."""
        query = sa.text("SELECT state FROM attempts ORDER BY epoch DESC LIMIT 1")
        with self._engine.connect() as connection:
            state = connection.execute(query).scalar_one()
        told = json.loads(state) if isinstance(state, str) else state  # SQLite has no type for JSON
        return {actor["pid"] for actor in told.get("actors", ()) if actor["state"] == "decoding"}

    def is_locked(self) -> bool:
        """Whether someone is writing into the SQLite file; False for PostgreSQL, which locks rows."""
        if self._url.get_backend_name() != "sqlite":
            return False
        with closing(sqlite3.connect(str(self._url.database), timeout=0, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            connection.execute("ROLLBACK")
            return False

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()


def _read_only(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() == "sqlite":
        return sa.create_engine(
            url, creator=lambda: sqlite3.connect(f"file:{url.database}?mode=ro", uri=True)
        )
    return sa.create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True)


def by_key(fetched: Iterable[tuple[Any, ...]]) -> dict[Key, tuple[Any, ...]]:
    """The answers by what they answer."""
    return {row[: len(_KEY)]: row[len(_KEY) :] for row in fetched}


def tokens_of_longest(rows: Rows, number: int) -> int:
    """Output tokens of the ``number`` longest answers."""
    return sum(sorted((row[_TOKENS] for row in rows.values()), reverse=True)[:number])


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the answers of one run."""

    answers: int  # rows there are
    lost: int  # asked for and not there, or seen committed and gone
    doubled: int  # rows too many for their key, or seen committed and replaced by another decoding
    tokens: int  # output tokens of all answers


def tally(expected: int, fetched: list[tuple[Any, ...]], seen: Iterable[Rows]) -> Tally:
    """Compare what is there at the end with what was asked for and with what was ``seen`` on the way."""
    final = by_key(fetched)
    known: dict[Key, set[tuple[Any, ...]]] = {}
    for rows in seen:
        for key, row in rows.items():
            known.setdefault(key, set()).add(row)
    gone = known.keys() - final.keys()
    never = max(expected - len(final.keys() | gone), 0)
    replaced = sum(key in final and rows != {final[key]} for key, rows in known.items())
    return Tally(
        answers=len(fetched),
        lost=len(gone) + never,
        doubled=len(fetched) - len(final) + replaced,
        tokens=tokens_of_longest(final, len(final)),
    )
