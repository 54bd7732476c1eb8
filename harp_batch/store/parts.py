"""A run's parts, written and read within the caller's transaction: its models, requests and evaluations."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from harp_batch.records import Evaluation
from harp_batch.store import rows
from harp_batch.store.run_records import ModelRecord, RunRecord, TaskRecord
from harp_batch.store.schema import EvaluationRow, Model, RequestRow, RequestSet, Run


def insert_run(connection: sa.Connection, run: RunRecord) -> None:
    """Insert the run with all its parts; raises ValueError for parts that do not fit together."""
    connection.execute(sa.insert(Run), rows.run_row(run))
    models = [rows.model_row(run.id, place, model) for place, model in enumerate(run.models)]
    insert_all(connection, Model, models)
    set_ids = {
        (task.model, task.task): _insert_task(connection, run.id, place, task)
        for place, task in enumerate(run.tasks)
    }
    insert_all(connection, EvaluationRow, _evaluation_rows(run, set_ids))


def insert_all(connection: sa.Connection, table: type[Any], values: list[rows.Row]) -> None:
    if values:
        connection.execute(sa.insert(table), values)


def _insert_task(connection: sa.Connection, run_id: str, position: int, task: TaskRecord) -> int:
    insert = sa.insert(RequestSet).returning(RequestSet.id)
    set_id = connection.execute(insert, rows.task_row(run_id, position, task)).scalar_one()
    values = [rows.request_row(set_id, place, request) for place, request in enumerate(task.requests)]
    insert_all(connection, RequestRow, values)
    return set_id


def _evaluation_rows(run: RunRecord, set_ids: dict[tuple[str, str], int]) -> list[rows.Row]:
    strangers = [e for e in run.evaluations if e.run_id != run.id or (e.model, e.task) not in set_ids]
    if strangers:
        raise ValueError(
            f"evaluation {strangers[0].id} names a run, model or task that its run does not have"
        )
    return [rows.evaluation_row(set_ids[e.model, e.task], n, e) for n, e in enumerate(run.evaluations)]


def load_models(connection: sa.Connection, run_id: str) -> tuple[ModelRecord, ...]:
    query = sa.select(Model.__table__).where(Model.run_id == run_id).order_by(Model.position)
    return tuple(map(rows.model_of, connection.execute(query).mappings()))


def load_tasks(connection: sa.Connection, run_id: str) -> tuple[TaskRecord, ...]:
    query = sa.select(RequestSet.__table__).where(RequestSet.run_id == run_id).order_by(RequestSet.position)
    return tuple(_load_task(connection, row) for row in connection.execute(query).mappings().all())


def _load_task(connection: sa.Connection, row: sa.RowMapping) -> TaskRecord:
    query = (
        sa.select(RequestRow.__table__)
        .where(RequestRow.request_set_id == row["id"])
        .order_by(RequestRow.position)
    )
    requests = connection.execute(query).mappings()
    return rows.task_of(row, tuple(rows.request_of(row["task"], request) for request in requests))


def load_evaluations(connection: sa.Connection, run_id: str) -> tuple[Evaluation, ...]:
    query = (
        sa.select(EvaluationRow.__table__, RequestSet.run_id, RequestSet.model, RequestSet.task)
        .join(RequestSet)
        .where(RequestSet.run_id == run_id)
        .order_by(EvaluationRow.position)
    )
    return tuple(map(rows.evaluation_of, connection.execute(query).mappings()))
