"""The use cases, one function each; the only place that wires the parts together.

A ``db_url`` is a SQLAlchemy URL, an ``address`` Ray's; a run is named by its id, a unique prefix of it, its
name (the newest) or ``latest``.
"""

from __future__ import annotations

from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harp_batch.cluster import driver
from harp_batch.cluster.layout import Wishes, lay_out
from harp_batch.errors import HarpBatchError, LeaseLost, RunFailed, StoreUnavailable, UserError
from harp_batch.job import JobSpec
from harp_batch.records import RunStatus
from harp_batch.service.attempts import begin, cancel_run, require_undriven
from harp_batch.service.execute import Recorder, decode, stop_signals
from harp_batch.service.metrics import save_metrics
from harp_batch.service.plan import Plan, plan_run, replan
from harp_batch.service.progress import EvaluationProgress, Observer, Progress, Silent
from harp_batch.store import Attempt, RunSummary, Store, open_store
from harp_batch.store.migrate import require_usable
from harp_batch.store.query import QueryResult, run_query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "EvaluationProgress",
    "Observer",
    "Plan",
    "Progress",
    "Silent",
    "cancel",
    "plan",
    "query",
    "require_resumable",
    "results",
    "resume",
    "status",
    "submit",
]


def plan(spec: JobSpec, data_dir: Path | None = None, observer: Observer | None = None) -> Plan:
    """What ``submit`` would run: every model resolved, every request built, nothing stored or started.

    Raises the UserError of whatever is wrong with the job.
    """
    return plan_run(spec, data_dir, (observer or Silent()).phase)


def submit(
    spec: JobSpec,
    *,
    db_url: str,
    data_dir: Path | None = None,
    address: str | None = None,
    observer: Observer | None = None,
    run_id: str | None = None,
) -> RunSummary:
    """Run ``spec`` and return how it ended: DONE, INTERRUPTED by SIGINT or SIGTERM, or CANCELLED.

    Raises a UserError before anything is stored where the job cannot be run, and RunFailed, StoreFull, LeaseLost
    or StoreUnavailable where a started run broke; what it committed stays and can be resumed.
    """
    observer = observer or Silent()
    require_usable(db_url)  # before minutes of work, and without making anything
    planned = plan_run(spec, data_dir, observer.phase, run_id)
    with _cluster(spec, address, observer) as wishes, open_store(db_url, create=True) as store:
        versions = planned.run.versions | {
            "device": "+".join(g.device for g in lay_out(driver.nodes(), wishes))
        }
        planned = replace(planned, run=replace(planned.run, versions=versions))
        store.create_run(planned.run)
        return _execute(planned, wishes, store, observer)


def resume(
    run_ref: str,
    *,
    db_url: str,
    data_dir: Path | None = None,
    address: str | None = None,
    observer: Observer | None = None,
) -> RunSummary:
    """Answer what the run still lacks and nothing else; return and raise like ``submit``.

    Raises RunBusy where another process drives the run.
    """
    observer = observer or Silent()
    with open_store(db_url, create=False) as store:
        found = store.find_run(run_ref)
        if found.status == RunStatus.DONE:
            observer.finished(found)
            return found
        require_resumable(store, found, observer.phase)  # before minutes of work
        planned = replan(store.load_run(found.id), data_dir, observer.phase)
        with _cluster(planned.spec, address, observer) as wishes:
            return _execute(planned, wishes, store, observer)


def require_resumable(store: Store, run: RunSummary, say: Callable[[str], None]) -> None:
    """Raise UserError for a cancelled run, and RunBusy where another process drives it."""
    if run.status == RunStatus.CANCELLED:
        raise UserError(f"run {run.name} ({run.id[:8]}) was cancelled, which is final; submit it anew")
    require_undriven(store, run, say)


def cancel(run_ref: str, *, db_url: str, observer: Observer | None = None) -> RunSummary:
    """Stop the run for good, wherever it is driven, and return how it ended; what is committed stays.

    Raises UserError for a run that is done, RunFailed where its driver does not stop.
    """
    observer = observer or Silent()
    with open_store(db_url, create=False) as store:
        found = store.find_run(run_ref)
        if found.status is not RunStatus.CANCELLED:
            cancel_run(store, found, observer.phase)
        return store.find_run(found.id)


def status(db_url: str, run_ref: str | None = None) -> list[RunSummary]:
    """The run that ``run_ref`` names, or the newest runs first."""
    with open_store(db_url, create=False, read_only=True) as store:
        return [store.find_run(run_ref)] if run_ref else store.runs()


def results(db_url: str, run_ref: str) -> list[dict[str, Any]]:
    """The run's rows of the view ``results``, in job order."""
    with open_store(db_url, create=False, read_only=True) as store:
        return store.results(store.find_run(run_ref).id)


def query(db_url: str, sql: str, max_rows: int = 10_000) -> QueryResult:
    """The rows of one read-only SQL statement. Raises QueryError for anything else."""
    return run_query(db_url, sql, max_rows=max_rows)


@contextmanager
def _cluster(spec: JobSpec, address: str | None, observer: Observer) -> Iterator[Wishes]:
    """Be connected to a cluster that can have the job's actors."""
    cluster = spec.cluster
    wishes = Wishes(cluster.actors, cluster.gpus_per_actor, cluster.cpu_actors)
    observer.phase("connecting to Ray" if address else "starting Ray")
    with driver.connect(address):
        lay_out(driver.nodes(), wishes)
        yield wishes


def _execute(planned: Plan, wishes: Wishes, store: Store, observer: Observer) -> RunSummary:
    run_id = planned.run.id
    attempt = _begin(store, run_id, observer)  # may wait for a lease to run out, and Ctrl-C ends that at once
    with stop_signals() as stop, _failure_recorded(store, attempt):
        observer.started(store.find_run(run_id))
        with closing(Recorder(planned, store, attempt, observer, stop)) as recorder:
            complete = decode(planned, wishes, recorder)
            if complete:
                recorder.phase("computing the results")
                recorder.patiently(lambda: save_metrics(planned, store))
        unfinished = RunStatus.CANCELLED if recorder.cancelled else RunStatus.INTERRUPTED
        recorder.require_reachable()
        recorder.patiently(lambda: store.end_attempt(attempt, RunStatus.DONE if complete else unfinished))
        ended = recorder.patiently(lambda: store.find_run(run_id))
    observer.finished(ended)
    return ended


def _begin(store: Store, run_id: str, observer: Observer) -> Attempt:
    try:
        return begin(store, run_id, observer.phase)
    except StoreUnavailable as exc:
        raise StoreUnavailable(f"{exc}; go on with `harp-batch resume {run_id[:8]}` when it does") from exc


@contextmanager
def _failure_recorded(store: Store, attempt: Attempt) -> Iterator[None]:
    """Leave no run behind as RUNNING that nobody runs; what goes wrong leaves as one sentence.

    Where the database is away nothing can be written down; the run is free again when the lease has run out.
    """
    try:
        yield
    except KeyboardInterrupt:
        with suppress(HarpBatchError):
            store.end_attempt(attempt, RunStatus.INTERRUPTED)
        raise
    except LeaseLost:
        raise
    except StoreUnavailable as exc:
        again = f"what is committed stays: go on with `harp-batch resume {attempt.run_id[:8]}` when it does"
        raise StoreUnavailable(f"{exc}; {again}") from exc
    except Exception as exc:
        failure = exc if isinstance(exc, HarpBatchError) else RunFailed(_sentence(attempt.run_id, exc))
        with suppress(HarpBatchError):  # the store may be what broke
            store.end_attempt(attempt, RunStatus.FAILED, error=str(failure))
        if failure is exc:
            raise
        raise failure from exc


def _sentence(run_id: str, exc: Exception) -> str:
    reason = " ".join(str(exc).split())
    return f"run {run_id} broke ({type(exc).__name__}: {reason}); go on with `harp-batch resume {run_id}`"
