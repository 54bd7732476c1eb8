"""Who drives a run, since when, and whether he still may.

An attempt may write as long as it has not ended. Whoever takes a run over ends the older attempt in the transaction
that begins his own, so there is never more than one that may. The functions work within the caller's transaction;
SQLite's has its lock from the beginning, in PostgreSQL the rows are locked: first the run's, then the attempt's.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from harp_batch.errors import LeaseLost, RunBusy, RunNotFound, UserError
from harp_batch.place import host_name
from harp_batch.records import RunStatus
from harp_batch.store.run_records import Attempt
from harp_batch.store.schema import AttemptRow, Run
from harp_batch.store.types import UtcDateTime, require_json

_NAMES = [field.name for field in fields(Attempt)]
_COLUMNS = [AttemptRow.__table__.c[name] for name in _NAMES]


def acquire(
    connection: sa.Connection, run_id: str, host: str, pid: int, stale_after: float, taking_over: int | None
) -> tuple[Attempt, bool]:
    """Begin the run's next attempt, and say whether it takes the run over from one that had not ended.

    Raises RunNotFound; RunBusy where the newest attempt was heard from within ``stale_after`` seconds and is not
    the epoch ``taking_over``; and UserError where the run was cancelled, which is final.
    """
    run = _locked_run(connection, run_id)
    older = _locked_newest(connection, run_id)
    now = connection.execute(sa.select(_clock(connection))).scalar_one()
    lost = older if older is not None and older["ended_at"] is None else None
    if lost is not None and lost["epoch"] != taking_over:
        _require_stale(run, lost, now, stale_after)
    if run["status"] == RunStatus.CANCELLED:
        raise UserError(
            f"{_name(run)} was cancelled, and a cancelled run is not taken up again: submit the job anew"
        )
    if lost is not None:
        _close_lost(connection, lost)
    epoch = older["epoch"] + 1 if older is not None else 1
    attempt = Attempt(run_id, epoch, host, pid, now, now, None, None, 0.0, {})
    _begin(connection, attempt, cancel_requested=lost is not None and lost["cancel_requested"])
    return attempt, lost is not None


def beat(connection: sa.Connection, attempt: Attempt, state: dict[str, Any], seconds: float) -> bool:
    """Write down that the attempt lasts; return whether it is asked to cancel. Raises LeaseLost."""
    require_json("the state of the attempt", [state, seconds])
    change = (
        sa.update(AttemptRow)
        .where(_may_write(attempt))
        .values(heartbeat_at=_clock(connection), state=state, seconds=seconds)
        .returning(AttemptRow.cancel_requested)
    )
    asked: bool | None = connection.execute(change).scalar_one_or_none()
    if asked is None:
        raise _lost(connection, attempt)
    return asked


def end(connection: sa.Connection, attempt: Attempt, status: RunStatus, error: str | None) -> None:
    """End the attempt and, with the same outcome, its run; once more does no harm. Raises LeaseLost."""
    _locked_run(connection, attempt.run_id)
    now = _clock(connection)
    change = (
        sa.update(AttemptRow)
        .where(_may_write(attempt))
        .values(heartbeat_at=now, ended_at=now, outcome=status.value)
    )
    if connection.execute(change).rowcount:
        ended = {"status": status.value, "error": error, "finished_at": now}
        connection.execute(sa.update(Run).where(Run.id == attempt.run_id).values(ended))
    elif not _ended_so(connection, attempt, status):
        raise _lost(connection, attempt)


def require_lasting(connection: sa.Connection, attempt: Attempt) -> None:
    """Raise LeaseLost unless the attempt may write; none takes the run over before this transaction ends."""
    held = sa.select(sa.literal(1)).where(_may_write(attempt)).with_for_update(read=True)
    if connection.execute(held).first() is None:
        raise _lost(connection, attempt)


def ask_to_cancel(connection: sa.Connection, run_id: str) -> None:
    """Ask the attempt that lasts, if there is one, to cancel the run."""
    lasting = sa.and_(AttemptRow.run_id == run_id, AttemptRow.ended_at.is_(None))
    connection.execute(sa.update(AttemptRow).where(lasting).values(cancel_requested=True))


def attempts_of(connection: sa.Connection, run_id: str) -> list[Attempt]:
    """The run's attempts, oldest first."""
    query = sa.select(*_COLUMNS).where(AttemptRow.run_id == run_id).order_by(AttemptRow.epoch)
    return [_attempt(row) for row in connection.execute(query).mappings()]


def _may_write(attempt: Attempt) -> sa.ColumnElement[bool]:
    return sa.and_(
        AttemptRow.run_id == attempt.run_id,
        AttemptRow.epoch == attempt.epoch,
        AttemptRow.ended_at.is_(None),
    )


def _locked_run(connection: sa.Connection, run_id: str) -> sa.RowMapping:
    query = sa.select(Run.id, Run.name, Run.status).where(Run.id == run_id).with_for_update()
    run = connection.execute(query).mappings().first()
    if run is None:
        raise RunNotFound(f"no run has the id {run_id!r}")
    return run


def _locked_newest(connection: sa.Connection, run_id: str) -> sa.RowMapping | None:
    query = sa.select(AttemptRow.__table__).where(AttemptRow.run_id == run_id)
    newest = query.order_by(AttemptRow.epoch.desc()).limit(1).with_for_update()
    return connection.execute(newest).mappings().first()


def _clock(connection: sa.Connection) -> sa.ColumnElement[datetime]:
    """Now, by the one clock that all drivers share: the server's, or that of the machine with the file."""
    if connection.dialect.name == "postgresql":
        return sa.func.clock_timestamp(type_=UtcDateTime())  # now() is when the transaction began
    return sa.literal(datetime.now(UTC), UtcDateTime())


def _require_stale(run: sa.RowMapping, holder: sa.RowMapping, now: datetime, stale_after: float) -> None:
    silence = (now - holder["heartbeat_at"]).total_seconds()
    if silence <= stale_after:
        raise RunBusy(
            f"{_name(run)} is being driven by {holder['host']} (process {holder['pid']}), heard from "
            f"{max(silence, 0):.0f} s ago; stop it there with Ctrl-C, or with `harp-batch cancel {run['id'][:8]}`",
            _attempt(holder),
        )


def _close_lost(connection: sa.Connection, lost: sa.RowMapping) -> None:
    """End the attempt as of when it was last heard from."""
    change = {"ended_at": lost["heartbeat_at"], "outcome": RunStatus.INTERRUPTED.value}
    this = sa.and_(AttemptRow.run_id == lost["run_id"], AttemptRow.epoch == lost["epoch"])
    connection.execute(sa.update(AttemptRow).where(this).values(change))


def _begin(connection: sa.Connection, attempt: Attempt, cancel_requested: bool) -> None:
    values = {name: getattr(attempt, name) for name in _NAMES}
    connection.execute(sa.insert(AttemptRow).values(**values, cancel_requested=cancel_requested))
    running = {"status": RunStatus.RUNNING.value, "error": None, "finished_at": None}
    connection.execute(sa.update(Run).where(Run.id == attempt.run_id).values(running))


def _ended_so(connection: sa.Connection, attempt: Attempt, status: RunStatus) -> bool:
    """Whether the attempt is the run's last and has that outcome: its end was committed and nobody was told."""
    newest = attempts_of(connection, attempt.run_id)[-1:]
    return [(a.epoch, a.outcome) for a in newest] == [(attempt.epoch, status)]


def _lost(connection: sa.Connection, attempt: Attempt) -> LeaseLost:
    newest = attempts_of(connection, attempt.run_id)[-1:]
    if newest and newest[0].epoch > attempt.epoch:
        by = f"was taken over by {host_name(newest[0].host)} (process {newest[0].pid})"
    else:
        by = "was ended by another process"
    return LeaseLost(f"run {attempt.run_id[:8]} {by}: this driver stops, and what it committed stays")


def _name(run: sa.RowMapping) -> str:
    return f"run {run['name']} ({run['id'][:8]})"


def _attempt(row: sa.RowMapping) -> Attempt:
    values = {name: row[name] for name in _NAMES}
    return Attempt(**{**values, "outcome": RunStatus(values["outcome"]) if values["outcome"] else None})
