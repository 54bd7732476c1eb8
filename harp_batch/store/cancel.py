"""Requests to cancel, beside a SQLite database: the run's driver is its only writer, so they are files.

A request is an empty file NAME.cancel-RUNID. PostgreSQL has a column for it.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from harp_batch.errors import DatabaseError


class CancelFiles:
    """The requests beside one database file."""

    def __init__(self, database: Path) -> None:
        self._database = database

    def ask(self, run_id: str) -> None:
        """Leave a request; raises DatabaseError where no file can be written."""
        path = self._path(run_id)
        try:
            path.touch()
        except OSError as error:
            raise DatabaseError(
                f"the request to cancel cannot be left in {path}: {error.strerror}"
            ) from error

    def asked(self, run_id: str) -> bool:
        """Whether there is a request."""
        return self._path(run_id).exists()

    def forget(self, run_id: str) -> None:
        """Remove the request, if there is one."""
        self._path(run_id).unlink(missing_ok=True)

    def _path(self, run_id: str) -> Path:
        return self._database.with_name(f"{self._database.name}.cancel-{quote(run_id, safe='')}")
