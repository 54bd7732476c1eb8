"""What can go wrong, as one tree.

    HarpBatchError                     exit code 3: the run failed or is incomplete
    ├── UserError                      exit code 2: the input was wrong; nothing was started
    │   ├── JobError                   the job file (names file, line and key)
    │   ├── ModelError                 a model reference, its files or its architecture
    │   ├── TaskError                  a task name, its settings or its data
    │   ├── DatabaseError              a database URL, its schema version or a connection at start
    │   ├── QueryError                 SQL that is refused or was stopped
    │   ├── RunNotFound                no run has that id, prefix or name
    │   ├── RunBusy                    another process drives the run (says which)
    │   └── ClusterError               resources that the Ray cluster does not have
    ├── RunFailed                      a run ended without all of its answers
    ├── LeaseLost                      another driver took the run over; this one must stop
    ├── StoreUnavailable               the database went away during a run; worth another try
    └── StoreFull                      the database's disk is full; another try fails, too

A message is one sentence that names what is wrong and how to mend it.
"""

from __future__ import annotations

from typing import Any


class HarpBatchError(Exception):
    """harp-batch could not go on."""

    exit_code = 3

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class UserError(HarpBatchError):
    """The input was wrong."""

    exit_code = 2


class JobError(UserError):
    """The job file is not valid."""


class ModelError(UserError):
    """The model cannot be used."""


class TaskError(UserError):
    """The task cannot be used."""


class DatabaseError(UserError):
    """The database cannot be used."""


class QueryError(UserError):
    """The query was refused."""


class RunNotFound(UserError):
    """There is no such run."""


class RunBusy(UserError):
    """Another process drives the run."""

    def __init__(self, message: str | None = None, attempt: Any = None) -> None:
        super().__init__(message)
        self.attempt = attempt  # the store's record of who drives it; no type, for nothing is imported here


class ClusterError(UserError):
    """The Ray cluster does not have what the job asks for."""


class RunFailed(HarpBatchError):
    """The run ended without all of its answers."""


class LeaseLost(HarpBatchError):
    """Another driver has taken the run over."""


class StoreUnavailable(HarpBatchError):
    """The database does not answer."""


class StoreFull(HarpBatchError):
    """The database's disk is full."""
