"""Durable state: runs, requests, answers with their traces, metrics, attempts; on SQLite and PostgreSQL alike."""

from harp_batch.store.query import QueryResult, run_query
from harp_batch.store.run_records import (
    HEARTBEAT,
    LEASE,
    Attempt,
    ModelRecord,
    RunRecord,
    RunSummary,
    TaskRecord,
)
from harp_batch.store.store import Store, open_store
from harp_batch.store.views import VIEWS

__all__ = [
    "HEARTBEAT",
    "LEASE",
    "VIEWS",
    "Attempt",
    "ModelRecord",
    "QueryResult",
    "RunRecord",
    "RunSummary",
    "Store",
    "TaskRecord",
    "open_store",
    "run_query",
]
