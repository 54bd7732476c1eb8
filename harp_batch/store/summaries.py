"""Runs in one line each: the queries behind a list of runs, and behind finding one by what people call it."""

from __future__ import annotations

import sqlalchemy as sa

from harp_batch.records import RunStatus
from harp_batch.store.run_records import RunSummary
from harp_batch.store.schema import AnswerRow, EvaluationRow, RequestSet, Run


def newest(connection: sa.Connection, limit: int) -> list[RunSummary]:
    """The newest runs, newest first."""
    return [_summary(row) for row in connection.execute(_SUMMARIES.limit(limit)).mappings()]


def find(connection: sa.Connection, ref: str) -> list[RunSummary]:
    """The run with that id, else "latest", else the newest of that name, else those whose id begins so."""
    choices = [Run.id == ref, *([sa.true()] if ref == "latest" else []), Run.name == ref]
    for choice in choices:
        row = connection.execute(_SUMMARIES.where(choice).limit(1)).mappings().first()
        if row is not None:
            return [_summary(row)]
    begins = sa.func.substr(Run.id, 1, len(ref)) == ref
    found = connection.execute(_SUMMARIES.where(begins).limit(5)).mappings() if ref else ()
    return [_summary(row) for row in found]


def _count(*condition: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    """How many answers of the enclosing query's run meet the condition."""
    return (
        sa.select(sa.func.count())
        .select_from(AnswerRow)
        .join(EvaluationRow)
        .join(RequestSet)
        .where(RequestSet.run_id == Run.id, *condition)
        .correlate(Run)
        .scalar_subquery()
    )


def _of_evaluations(value: sa.ColumnElement[int]) -> sa.ScalarSelect[int]:
    """An aggregate over the evaluations of the enclosing query's run."""
    return (
        sa.select(value)
        .select_from(EvaluationRow)
        .join(RequestSet)
        .where(RequestSet.run_id == Run.id)
        .correlate(Run)
        .scalar_subquery()
    )


_SUMMARIES = sa.select(
    Run.id,
    Run.name,
    Run.status,
    Run.created_at,
    Run.finished_at,
    Run.error,
    _of_evaluations(sa.func.count()).label("evaluations"),
    _of_evaluations(sa.func.coalesce(sa.func.sum(EvaluationRow.requests), 0)).label("requests"),
    _count().label("answered"),
    _count(AnswerRow.error.is_not(None)).label("errors"),
).order_by(Run.created_at.desc(), Run.id.desc())


def _summary(row: sa.RowMapping) -> RunSummary:
    return RunSummary(**{**row, "status": RunStatus(row["status"])})
