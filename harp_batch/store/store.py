"""The store: everything durable that harp-batch knows, behind one small class.

The driver is the only writer; everybody else opens the store read-only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from harp_batch.errors import RunNotFound
from harp_batch.records import Answer, Evaluation, MetricValue, RunStatus
from harp_batch.store import attempts, migrate, parts, rows, summaries
from harp_batch.store.cancel import CancelFiles
from harp_batch.store.database import is_sqlite, make_engine, parse_url, show, sqlite_path, writer
from harp_batch.store.failures import DRIVER_ERRORS, understood
from harp_batch.store.run_records import Attempt, ModelRecord, RunRecord, RunSummary
from harp_batch.store.schema import AnswerRow, EvaluationRow, MetricRow, RequestSet, Run
from harp_batch.store.views import RESULTS

_TRACE = {"token_ids", "entropy", "hesitated", "vanilla_offsets", "flipped"}
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

    Methods raise StoreUnavailable when it goes away, StoreFull when its disk is full, and DatabaseError where its
    role lacks a right. A commit that raised StoreUnavailable may have landed all the same: do it again.
    """

    def __init__(self, url: sa.URL, *, read_only: bool = False) -> None:
        self._shown = show(url)
        self._engine = make_engine(url, "ro" if read_only else "rw")
        self._writer = writer(self._engine)
        self._cancel_files = CancelFiles(sqlite_path(url)) if is_sqlite(url) else None
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
        with self._writing() as connection:
            parts.insert_run(connection, run)

    def runs(self, limit: int = 50) -> list[RunSummary]:
        """The newest runs, newest first."""
        with self._reading() as connection:
            return summaries.newest(connection, limit)

    def find_run(self, ref: str) -> RunSummary:
        """The run with that id, else "latest", else the newest of that name, else the one id that begins so.

        Raises RunNotFound, which says what there is, for none and for several.
        """
        with self._reading() as connection:
            found = summaries.find(connection, ref)
        if len(found) == 1:
            return found[0]
        raise RunNotFound(self._not_found(ref, [run.id for run in found]))

    def _not_found(self, ref: str, begin_so: list[str]) -> str:
        if begin_so:
            return f"more than one run begins with {ref!r}: {', '.join(begin_so)}; give more of the id"
        newest = [f"{run.name} ({run.id})" for run in self.runs(limit=5)]
        there_is = f"the newest are {', '.join(newest)}" if newest else "there are no runs yet"
        return f"no run has the id, the beginning of an id or the name {ref!r} in {self._shown}: {there_is}"

    def load_run(self, run_id: str) -> RunRecord:
        """Everything needed to resume the run; raises RunNotFound."""
        with self._reading() as connection:
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
                models=parts.load_models(connection, run_id),
                tasks=parts.load_tasks(connection, run_id),
                evaluations=parts.load_evaluations(connection, run_id),
                error=run["error"],
            )

    # Attempts

    def acquire(
        self, run_id: str, host: str, pid: int, *, stale_after: float, taking_over: int | None = None
    ) -> Attempt:
        """Become the run's driver, which sets the run to ``running``; of several at once one does.

        Raises RunBusy while another attempt lasts, unless it was not heard from for ``stale_after`` seconds or its
        epoch is ``taking_over``: one whose process the caller knows to be gone. Raises RunNotFound, and UserError
        for a run that was cancelled.
        """
        with self._writing() as connection:
            attempt, took_over = attempts.acquire(connection, run_id, host, pid, stale_after, taking_over)
            if self._cancel_files and not took_over:
                self._cancel_files.forget(run_id)  # it came after the last driver's end
        return attempt

    def heartbeat(self, attempt: Attempt, state: dict[str, Any], seconds: float) -> bool:
        """Say that the attempt lasts, with its state and its seconds of decoding; returns whether to cancel the run.

        Raises LeaseLost where the attempt lasts no longer.
        """
        with self._writing() as connection:
            asked = attempts.beat(connection, attempt, state, seconds)
        return asked or (self._cancel_files is not None and self._cancel_files.asked(attempt.run_id))

    def end_attempt(self, attempt: Attempt, status: RunStatus, error: str | None = None) -> None:
        """End the attempt, and with it the run, which gets the status; raises LeaseLost like `heartbeat`."""
        with self._writing() as connection:
            attempts.end(connection, attempt, status, error)
        if self._cancel_files:
            self._cancel_files.forget(attempt.run_id)

    def attempts(self, run_id: str) -> list[Attempt]:
        """Who drove the run, oldest first."""
        with self._reading() as connection:
            return attempts.attempts_of(connection, run_id)

    def request_cancel(self, run_id: str) -> None:
        """Ask the run's driver, if it has one, to cancel it; the answer of its next `heartbeat` says so.

        For PostgreSQL the store must not be read-only. Raises DatabaseError where the request cannot be left.
        """
        if self._cancel_files is None:
            with self._writing() as connection:
                attempts.ask_to_cancel(connection, run_id)
        elif any(attempt.ended_at is None for attempt in self.attempts(run_id)):
            self._cancel_files.ask(run_id)

    # Answers

    def commit(self, answers: Sequence[Answer], attempt: Attempt | None = None) -> int:
        """Commit the answers with their traces in one transaction; returns how many were not there before.

        An answer that is there already stays as it is. Raises ValueError where an answer holds NaN or infinity or
        belongs to no evaluation, and LeaseLost where ``attempt`` is given and lasts no longer; nothing of the
        answers is committed then.
        """
        values = [rows.answer_row(answer) for answer in answers]
        if not values:
            return 0
        with self._writing() as connection:
            if attempt is not None:
                attempts.require_lasting(connection, attempt)
            result = connection.execute(
                self._insert_answers, values, execution_options={"preserve_rowcount": True}
            )
            return result.rowcount

    def answered(self, evaluation_id: str) -> set[tuple[int, int]]:
        """(document, repeat) of every committed answer."""
        query = sa.select(AnswerRow.doc_id, AnswerRow.repeat).where(AnswerRow.evaluation_id == evaluation_id)
        with self._reading() as connection:
            return {(doc_id, repeat) for doc_id, repeat in connection.execute(query)}

    def answers(self, evaluation_id: str, *, traces: bool = False) -> Iterator[Answer]:
        """Committed answers in the order of document and repeat; their traces are empty unless asked for."""
        columns = [c for c in AnswerRow.__table__.c if traces or c.name not in _TRACE]
        query = (
            sa.select(*columns)
            .where(AnswerRow.evaluation_id == evaluation_id)
            .order_by(AnswerRow.doc_id, AnswerRow.repeat)
        )
        with self._reading() as connection:
            result = connection.execution_options(yield_per=_CHUNK).execute(query)
            yield from map(rows.answer_of, result.mappings())

    def run_answers(self, run_id: str) -> Iterator[tuple[ModelRecord, Evaluation, Answer]]:
        """The run's committed answers with their traces; no more than one chunk of them is in memory.

        They come in the order of model, task, method, document and repeat. Names are compared by code point and
        here: databases sort text by their own locales.
        """
        with self._reading() as connection:
            models = {model.ref: model for model in parts.load_models(connection, run_id)}
            evaluations = parts.load_evaluations(connection, run_id)
        for evaluation in sorted(evaluations, key=lambda e: (e.model, e.task, e.method)):
            for answer in self.answers(evaluation.id, traces=True):
                yield models[evaluation.model], evaluation, answer

    # Metrics

    def save_metrics(self, run_id: str, metrics: Sequence[MetricValue]) -> None:
        """Replace the run's metrics."""
        columns = MetricRow.__table__.c.keys()
        values = [{name: getattr(metric, name) for name in columns} for metric in metrics]
        own = sa.select(EvaluationRow.id).join(RequestSet).where(RequestSet.run_id == run_id)
        with self._writing() as connection:
            connection.execute(sa.delete(MetricRow).where(MetricRow.evaluation_id.in_(own)))
            parts.insert_all(connection, MetricRow, values)

    def results(self, run_id: str) -> list[dict[str, Any]]:
        """The run's rows of the view ``results``, in the order of the job file."""
        query = sa.select(_RESULTS).where(_RESULTS.c.run_id == run_id)
        with self._reading() as connection:
            found = [dict(row) for row in connection.execute(query).mappings()]
            evaluations = parts.load_evaluations(connection, run_id)
        order = {(e.model, e.task, e.method): place for place, e in enumerate(evaluations)}
        return sorted(
            found,
            key=lambda r: (order[r["model"], r["task"], r["method"]], r["metric"], r["filter"]),
        )

    @contextmanager
    def _transaction(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        try:
            with engine.begin() as connection:
                yield connection
        except DRIVER_ERRORS as error:
            raise understood(engine.url, error) from error

    def _reading(self) -> AbstractContextManager[sa.Connection]:
        return self._transaction(self._engine)

    def _writing(self) -> AbstractContextManager[sa.Connection]:
        return self._transaction(self._writer)
