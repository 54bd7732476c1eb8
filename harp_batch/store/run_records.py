"""Frozen records of a run as the store keeps it: what was asked of which model, and how far it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from harp_batch.records import Evaluation, Request, RunStatus

HEARTBEAT = 2.0  # seconds between two signs of life of a run's driver
LEASE = 15.0  # seconds after which a driver that is not heard from may be replaced


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model as it was resolved when the run began."""

    ref: str  # as the job file has it
    revision: str | None
    dtype: str
    chat_template: bool
    weights_sha256: str
    parameters: int


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as one model was asked it: every request of it, built once."""

    model: str  # ModelRecord.ref
    task: str
    version: str
    num_fewshot: int
    requests: tuple[Request, ...]
    info: dict[str, Any] = field(default_factory=dict)  # lm-eval's configuration of the task, as JSON values

    @property
    def requests_sha256(self) -> str:
        """Hash of everything that was asked, in order: equal hashes mean comparable evaluations."""
        digest = hashlib.sha256()
        for r in self.requests:
            asked = [r.key, r.prompt_sha256, r.prompt_ids, r.stop, r.max_new_tokens]
            digest.update(json.dumps(asked).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything that is needed to start or to resume a run."""

    id: str
    name: str
    status: RunStatus
    created_at: datetime  # aware
    job_yaml: str  # the effective job, loadable again
    seed: int
    versions: dict[str, Any]  # of harp-batch, Python, torch, ...
    models: tuple[ModelRecord, ...]
    tasks: tuple[TaskRecord, ...]
    evaluations: tuple[Evaluation, ...]  # each names a model and a task of the two fields above
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One line of a list of runs."""

    id: str
    name: str
    status: RunStatus
    created_at: datetime  # UTC
    finished_at: datetime | None  # UTC; None while the run is running
    evaluations: int
    requests: int  # answers that make the run complete
    answered: int  # answers that are committed, errors included
    errors: int
    error: str | None  # why the run failed


@dataclass(frozen=True, slots=True)
class Attempt:
    """One driver's session with a run; the newest one that has not ended is the only one that may write."""

    run_id: str
    epoch: int  # 1 for the run's first attempt, one more for each that follows
    host: str
    pid: int
    started_at: datetime  # UTC, as are the other two; by the database's clock
    heartbeat_at: datetime  # when the driver was last heard from
    ended_at: datetime | None  # for one that was lost: when it was last heard from
    outcome: RunStatus | None  # None while it lasts
    seconds: float  # wall seconds that it has been decoding
    state: dict[str, Any]  # what the driver last said of itself, as JSON values
