"""Who drives a run: one process at a time, named in the database and heard from every two seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from harp_batch.errors import RunBusy, RunFailed, UserError
from harp_batch.place import here, host_name
from harp_batch.records import RunStatus
from harp_batch.store import HEARTBEAT, LEASE, Attempt, RunSummary, Store

Say = Callable[[str], None]
GLANCE = 0.25  # seconds between two looks at another driver
CANCEL_SECONDS = 60.0  # for a driver to notice that it is to stop, and to stop


def begin(store: Store, run_id: str, say: Say) -> Attempt:
    """Become the run's driver.

    Raises RunBusy where another one is heard from. One that is silent gets as long as it may be silent; one whose
    process is gone from this machine gets no time at all.
    """
    silent: Attempt | None = None
    while True:
        try:
            return _acquire(store, run_id, silent)
        except RunBusy as busy:
            holder: Attempt = busy.attempt
            if _gone(holder):
                silent = holder
                continue
            if silent is not None and _beats(holder) != _beats(silent):
                raise
            if silent is None:
                say(f"listening for the run's driver, process {holder.pid} on {host_name(holder.host)}")
            silent = holder
        time.sleep(GLANCE)


def _acquire(store: Store, run_id: str, silent: Attempt | None) -> Attempt:
    gone = silent.epoch if silent is not None and _gone(silent) else None
    return store.acquire(run_id, here(), os.getpid(), stale_after=LEASE, taking_over=gone)


def require_undriven(store: Store, run: RunSummary, say: Say) -> None:
    """Raise RunBusy where a driver of the run is heard from; looks only."""
    if run.status is RunStatus.RUNNING:
        say("listening for another driver of the run")
        if _driven(store, run.id):
            holder = store.attempts(run.id)[-1]
            raise RunBusy(
                f"run {run.name} ({run.id[:8]}) is being driven by {host_name(holder.host)} (process {holder.pid}), "
                f"heard from just now; stop it there with Ctrl-C, or with `harp-batch cancel {run.id[:8]}`",
                holder,
            )


def cancel_run(store: Store, run: RunSummary, say: Say) -> None:
    """End the run for good; what is committed stays.

    Raises UserError where it is done already, RunFailed where its driver does not stop.
    """
    deadline = time.monotonic() + CANCEL_SECONDS
    while (status := store.find_run(run.id).status) is not RunStatus.CANCELLED:
        if status is RunStatus.DONE:
            raise UserError(f"run {run.name} ({run.id[:8]}) is done already: there is nothing to cancel")
        if time.monotonic() > deadline:
            raise RunFailed(
                f"the driver of run {run.name} ({run.id[:8]}) was asked to stop and has not done so for "
                f"{CANCEL_SECONDS:.0f} s; it will when it next reaches the database"
            )
        store.request_cancel(run.id)  # again and again: a driver may just have begun
        if not _driven(store, run.id):
            with suppress(UserError):  # it came back, or another one cancelled it
                store.end_attempt(begin(store, run.id, say), RunStatus.CANCELLED)
        time.sleep(GLANCE)


def _driven(store: Store, run_id: str) -> bool:
    """Whether a driver is heard from; looks twice, a little more than a heartbeat apart."""
    before = store.attempts(run_id)
    if not before or before[-1].ended_at is not None or _gone(before[-1]):
        return False
    time.sleep(HEARTBEAT + GLANCE)
    after = store.attempts(run_id)[-1]
    return after.ended_at is not None or _beats(after) != _beats(before[-1])


def _gone(attempt: Attempt) -> bool:
    """Whether the attempt's process was of this machine and is no more."""
    return attempt.host == here() and not psutil.pid_exists(attempt.pid)


def _beats(attempt: Attempt) -> tuple[int, object]:
    return attempt.epoch, attempt.heartbeat_at
