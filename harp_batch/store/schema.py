"""The tables. One row an answer, its trace inside it; people read them through the views of `views`.

A change here needs a revision in db/migrations: a test compares the two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from harp_batch.records import RunStatus
from harp_batch.store.types import BoolArray, CleanJson, CleanText, Float32Array, IntArray, UtcDateTime

_STATUSES = ", ".join(f"'{status}'" for status in RunStatus)


class Base(DeclarativeBase):
    """What the tables share: names of constraints, and types that are alike on both back ends."""

    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 -- SQLAlchemy reads it from the class
        str: CleanText,
        dict[str, Any]: CleanJson,
        list[Any]: CleanJson,
        datetime: UtcDateTime,
        float: sa.Double,
        tuple[int, ...]: IntArray,
        tuple[float, ...]: Float32Array,
        tuple[bool, ...]: BoolArray,
    }


class Run(Base):
    """One submitted job."""

    __tablename__ = "runs"
    __table_args__ = (
        sa.CheckConstraint(f"status IN ({_STATUSES})", name="status"),
        sa.Index(None, "created_at"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    status: Mapped[str]
    error: Mapped[str | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    job_yaml: Mapped[str]
    seed: Mapped[int] = mapped_column(sa.BigInteger)
    versions: Mapped[dict[str, Any]]


class AttemptRow(Base):
    """One driver's session with a run. A takeover ends the older one in the same transaction."""

    __tablename__ = "attempts"
    __table_args__ = (sa.CheckConstraint(f"outcome IN ({_STATUSES})", name="outcome"),)
    run_id: Mapped[str] = mapped_column(sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    cancel_requested: Mapped[bool]  # PostgreSQL only: SQLite has `cancel`
    seconds: Mapped[float]
    state: Mapped[dict[str, Any]]


class Model(Base):
    """One model of a run, as it was resolved."""

    __tablename__ = "models"
    run_id: Mapped[str] = mapped_column(sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    ref: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int]  # in the job file
    revision: Mapped[str | None]
    dtype: Mapped[str]
    chat_template: Mapped[bool]
    weights_sha256: Mapped[str]
    parameters: Mapped[int] = mapped_column(sa.BigInteger)


class RequestSet(Base):
    """One task as one model was asked it."""

    __tablename__ = "request_sets"
    __table_args__ = (
        sa.ForeignKeyConstraint(["run_id", "model"], ["models.run_id", "models.ref"], ondelete="CASCADE"),
        sa.UniqueConstraint("run_id", "model", "task"),
    )
    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    run_id: Mapped[str]
    model: Mapped[str]
    task: Mapped[str]
    position: Mapped[int]
    version: Mapped[str]
    num_fewshot: Mapped[int]
    info: Mapped[dict[str, Any]]
    requests_sha256: Mapped[str]


class RequestRow(Base):
    """One request, as it was built before anything ran."""

    __tablename__ = "requests"
    request_set_id: Mapped[int] = mapped_column(
        sa.ForeignKey("request_sets.id", ondelete="CASCADE"), primary_key=True
    )
    doc_id: Mapped[int] = mapped_column(primary_key=True)
    repeat: Mapped[int] = mapped_column(primary_key=True)
    position: Mapped[int]
    kind: Mapped[str]
    prompt: Mapped[str]
    prompt_sha256: Mapped[str]
    prompt_ids: Mapped[tuple[int, ...]]
    choices: Mapped[list[Any]]  # [context ids, continuation, continuation ids] each
    stop: Mapped[list[Any]]
    max_new_tokens: Mapped[int]
    target: Mapped[str]
    doc: Mapped[dict[str, Any]]


class EvaluationRow(Base):
    """One method on one request set."""

    __tablename__ = "evaluations"
    __table_args__ = (sa.UniqueConstraint("request_set_id", "method"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    request_set_id: Mapped[int] = mapped_column(sa.ForeignKey("request_sets.id", ondelete="CASCADE"))
    position: Mapped[int]
    method: Mapped[str]
    settings: Mapped[dict[str, Any]]
    is_baseline: Mapped[bool]
    requests: Mapped[int]


sa.Index(
    "uq_evaluations_baseline",
    EvaluationRow.request_set_id,
    unique=True,
    sqlite_where=EvaluationRow.is_baseline,
    postgresql_where=EvaluationRow.is_baseline,
)


class AnswerRow(Base):
    """One answer with its trace. The wide columns stand last, so that sums need not read them."""

    __tablename__ = "answer_rows"
    evaluation_id: Mapped[str] = mapped_column(
        sa.ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True
    )
    doc_id: Mapped[int] = mapped_column(primary_key=True)
    repeat: Mapped[int] = mapped_column(primary_key=True)
    correct: Mapped[bool | None]
    finish_reason: Mapped[str]
    prompt_tokens: Mapped[int]
    output_tokens: Mapped[int]  # length of the trace
    hesitations: Mapped[int]
    flips: Mapped[int]
    forward_tokens: Mapped[int]
    seconds: Mapped[float]
    error: Mapped[str | None]
    scores: Mapped[dict[str, Any]]
    choices: Mapped[list[Any]]  # [logprob, is_greedy] each
    text: Mapped[str | None]
    token_ids: Mapped[tuple[int, ...]]
    entropy: Mapped[tuple[float, ...]]
    hesitated: Mapped[tuple[bool, ...]]
    vanilla_offsets: Mapped[
        tuple[int, ...]
    ]  # vanilla token minus token: mostly zeros, which take little room
    flipped: Mapped[tuple[bool, ...]]


# Counting a run's errors must not read its answers.
sa.Index(
    "ix_answer_rows_errors",
    AnswerRow.evaluation_id,
    sqlite_where=AnswerRow.error.is_not(None),
    postgresql_where=AnswerRow.error.is_not(None),
)


class MetricRow(Base):
    """One metric of one evaluation; NULL means undefined."""

    __tablename__ = "metric_rows"
    evaluation_id: Mapped[str] = mapped_column(
        sa.ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True
    )
    metric: Mapped[str] = mapped_column(primary_key=True)
    filter: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float | None]
    stderr: Mapped[float | None]
    ci_low: Mapped[float | None]
    ci_high: Mapped[float | None]
    n: Mapped[int]
    delta: Mapped[float | None]
    delta_ci_low: Mapped[float | None]
    delta_ci_high: Mapped[float | None]
    p_value: Mapped[float | None]
