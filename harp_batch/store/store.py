"""The store: everything durable that harp-batch knows, behind one small class.

The driver is the only writer; everybody else opens the store read-only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError

from harp_batch.errors import RunNotFound, StoreUnavailable
from harp_batch.records import Answer, Evaluation, MetricValue, RunStatus
from harp_batch.store import migrate, rows
from harp_batch.store.database import is_sqlite, make_engine, parse_url, show
from harp_batch.store.run_records import ModelRecord, RunRecord, RunSummary, TaskRecord
from harp_batch.store.schema import (
    AnswerRow,
    EvaluationRow,
    MetricRow,
    Model,
    RequestRow,
    RequestSet,
    Run,
)
from harp_batch.store.views import RESULTS

_TRACE = {"token_ids", "entropy", "hesitated", "vanilla_token_ids", "flipped"}
_CHUNK = 500  # answers held in memory while they are read
_RESULTS = sa.table("results", *(sa.column(name) for name in RESULTS))


def open_store(url: str, *, create: bool = True, read_only: bool = False) -> Store:
    """The store at the URL; with ``create`` a missing or empty database is set up first.

    Raises DatabaseError for a bad URL, a database that cannot be reached and a schema of another version.
    """
    if create and not read_only:
        migrate.ensure(url)
    else:
        migrate.require_current(url)
    return Store(parse_url(url), read_only=read_only)


class Store:
    """Runs, answers and metrics in one database.

    Methods raise StoreUnavailable when it goes away, and DatabaseError where its role lacks a right.
    """

    def __init__(self, url: sa.URL, *, read_only: bool = False) -> None:
        self._shown = show(url)
        self._engine = make_engine(url, "ro" if read_only else "rw")
        insert = sqlite.insert if is_sqlite(url) else postgresql.insert
        self._insert_answers = insert(AnswerRow).on_conflict_do_nothing(
            index_elements=["evaluation_id", "doc_id", "repeat"]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; the store can be used again all the same."""
        self._engine.dispose()

    # Runs

    def create_run(self, run: RunRecord) -> None:
        """Commit the run with its models, requests and evaluations, or nothing of it.

        Raises ValueError for an id that exists already and for parts that do not fit together.
        """
        with self._transaction() as connection:
            connection.execute(sa.insert(Run), rows.run_row(run))
            models = [rows.model_row(run.id, place, model) for place, model in enumerate(run.models)]
            _insert(connection, Model, models)
            set_ids = {
                (task.model, task.task): _insert_task(connection, run.id, place, task)
                for place, task in enumerate(run.tasks)
            }
            _insert(connection, EvaluationRow, _evaluation_rows(run, set_ids))

    def set_status(self, run_id: str, status: RunStatus, error: str | None = None) -> None:
        """Set the run's status; any but ``running`` is stamped with the time."""
        finished_at = None if status is RunStatus.RUNNING else datetime.now(UTC)
        change = {"status": status.value, "error": error, "finished_at": finished_at}
        with self._transaction() as connection:
            connection.execute(sa.update(Run).where(Run.id == run_id).values(change))

    def runs(self, limit: int = 50) -> list[RunSummary]:
        """The newest runs, newest first."""
        with self._transaction() as connection:
            return [_summary(row) for row in connection.execute(_SUMMARIES.limit(limit)).mappings()]

    def find_run(self, ref: str) -> RunSummary:
        """The run with that id, else "latest", else the newest of that name, else the one id that begins so.

        Raises RunNotFound, which says what there is, for none and for several.
        """
        begins = sa.func.substr(Run.id, 1, len(ref)) == ref
        choices = [Run.id == ref, *([sa.true()] if ref == "latest" else []), Run.name == ref]
        with self._transaction() as connection:
            for choice in choices:
                row = connection.execute(_SUMMARIES.where(choice).limit(1)).mappings().first()
                if row is not None:
                    return _summary(row)
            found = connection.execute(_SUMMARIES.where(begins).limit(5)).mappings().all() if ref else []
        if len(found) == 1:
            return _summary(found[0])
        raise RunNotFound(self._not_found(ref, [row["id"] for row in found]))

    def _not_found(self, ref: str, begin_so: list[str]) -> str:
        if begin_so:
            return f"more than one run begins with {ref!r}: {', '.join(begin_so)}; give more of the id"
        newest = [f"{run.name} ({run.id})" for run in self.runs(limit=5)]
        there_is = f"the newest are {', '.join(newest)}" if newest else "there are no runs yet"
        return f"no run has the id, the beginning of an id or the name {ref!r} in {self._shown}: {there_is}"

    def load_run(self, run_id: str) -> RunRecord:
        """Everything needed to resume the run; raises RunNotFound."""
        with self._transaction() as connection:
            run = connection.execute(sa.select(Run.__table__).where(Run.id == run_id)).mappings().first()
            if run is None:
                raise RunNotFound(f"no run has the id {run_id!r} in {self._shown}")
            return RunRecord(
                id=run["id"],
                name=run["name"],
                status=RunStatus(run["status"]),
                created_at=run["created_at"],
                job_yaml=run["job_yaml"],
                seed=run["seed"],
                versions=run["versions"],
                models=_load_models(connection, run_id),
                tasks=_load_tasks(connection, run_id),
                evaluations=_load_evaluations(connection, run_id),
                error=run["error"],
            )

    # Answers

    def commit(self, answers: Sequence[Answer]) -> int:
        """Commit the answers with their traces in one transaction; returns how many were not there before.

        An answer that is there already stays as it is. Raises ValueError, and commits nothing, where an
        answer holds NaN or infinity or belongs to no evaluation.
        """
        values = [rows.answer_row(answer) for answer in answers]
        if not values:
            return 0
        with self._transaction() as connection:
            result = connection.execute(
                self._insert_answers, values, execution_options={"preserve_rowcount": True}
            )
            return result.rowcount

    def answered(self, evaluation_id: str) -> set[tuple[int, int]]:
        """(document, repeat) of every committed answer."""
        query = sa.select(AnswerRow.doc_id, AnswerRow.repeat).where(AnswerRow.evaluation_id == evaluation_id)
        with self._transaction() as connection:
            return {(doc_id, repeat) for doc_id, repeat in connection.execute(query)}

    def answers(self, evaluation_id: str, *, traces: bool = False) -> Iterator[Answer]:
        """Committed answers in the order of document and repeat; their traces are empty unless asked for."""
        columns = [c for c in AnswerRow.__table__.c if traces or c.name not in _TRACE]
        query = (
            sa.select(*columns)
            .where(AnswerRow.evaluation_id == evaluation_id)
            .order_by(AnswerRow.doc_id, AnswerRow.repeat)
        )
        with self._transaction() as connection:
            result = connection.execution_options(yield_per=_CHUNK).execute(query)
            yield from map(rows.answer_of, result.mappings())

    def run_answers(self, run_id: str) -> Iterator[tuple[ModelRecord, Evaluation, Answer]]:
        """The run's committed answers with their traces; no more than one chunk of them is in memory.

        They come in the order of model, task, method, document and repeat. Names are compared by code point and
        here: databases sort text by their own locales.
        """
        with self._transaction() as connection:
            models = {model.ref: model for model in _load_models(connection, run_id)}
            evaluations = _load_evaluations(connection, run_id)
        for evaluation in sorted(evaluations, key=lambda e: (e.model, e.task, e.method)):
            for answer in self.answers(evaluation.id, traces=True):
                yield models[evaluation.model], evaluation, answer

    # Metrics

    def save_metrics(self, run_id: str, metrics: Sequence[MetricValue]) -> None:
        """Replace the run's metrics."""
        columns = MetricRow.__table__.c.keys()
        values = [{name: getattr(metric, name) for name in columns} for metric in metrics]
        own = sa.select(EvaluationRow.id).join(RequestSet).where(RequestSet.run_id == run_id)
        with self._transaction() as connection:
            connection.execute(sa.delete(MetricRow).where(MetricRow.evaluation_id.in_(own)))
            _insert(connection, MetricRow, values)

    def results(self, run_id: str) -> list[dict[str, Any]]:
        """The run's rows of the view ``results``, in the order of the job file."""
        query = sa.select(_RESULTS).where(_RESULTS.c.run_id == run_id)
        with self._transaction() as connection:
            found = [dict(row) for row in connection.execute(query).mappings()]
            evaluations = _load_evaluations(connection, run_id)
        order = {(e.model, e.task, e.method): place for place, e in enumerate(evaluations)}
        return sorted(
            found,
            key=lambda r: (order[r["model"], r["task"], r["method"]], r["metric"], r["filter"]),
        )

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (IntegrityError, DataError) as error:
            raise ValueError(f"what was to be stored does not fit the database: {error.orig}") from error
        except ProgrammingError as error:  # it does answer: a right or a table is missing
            raise migrate.unusable(self._engine.url, error) from error
        except DBAPIError as error:
            raise StoreUnavailable(f"the database {self._shown} does not answer: {error.orig}") from error


def _insert(connection: sa.Connection, table: type[Any], values: list[rows.Row]) -> None:
    if values:
        connection.execute(sa.insert(table), values)


def _insert_task(connection: sa.Connection, run_id: str, position: int, task: TaskRecord) -> int:
    insert = sa.insert(RequestSet).returning(RequestSet.id)
    set_id = connection.execute(insert, rows.task_row(run_id, position, task)).scalar_one()
    values = [rows.request_row(set_id, place, request) for place, request in enumerate(task.requests)]
    _insert(connection, RequestRow, values)
    return set_id


def _evaluation_rows(run: RunRecord, set_ids: dict[tuple[str, str], int]) -> list[rows.Row]:
    strangers = [e for e in run.evaluations if e.run_id != run.id or (e.model, e.task) not in set_ids]
    if strangers:
        raise ValueError(
            f"evaluation {strangers[0].id} names a run, model or task that its run does not have"
        )
    return [rows.evaluation_row(set_ids[e.model, e.task], n, e) for n, e in enumerate(run.evaluations)]


def _load_models(connection: sa.Connection, run_id: str) -> tuple[ModelRecord, ...]:
    query = sa.select(Model.__table__).where(Model.run_id == run_id).order_by(Model.position)
    return tuple(map(rows.model_of, connection.execute(query).mappings()))


def _load_tasks(connection: sa.Connection, run_id: str) -> tuple[TaskRecord, ...]:
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


def _load_evaluations(connection: sa.Connection, run_id: str) -> tuple[Evaluation, ...]:
    query = (
        sa.select(EvaluationRow.__table__, RequestSet.run_id, RequestSet.model, RequestSet.task)
        .join(RequestSet)
        .where(RequestSet.run_id == run_id)
        .order_by(EvaluationRow.position)
    )
    return tuple(map(rows.evaluation_of, connection.execute(query).mappings()))


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
