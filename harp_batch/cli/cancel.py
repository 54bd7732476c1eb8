"""``harp-batch cancel``: a run is to end for good, wherever its driver is."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import click

from harp_batch.cli.options import dashboard_option, db_option, typed_again
from harp_batch.cli.progress import ProgressReport, display
from harp_batch.cli.running import ending
from harp_batch.errors import DatabaseError, RunNotFound

if TYPE_CHECKING:
    from harp_batch.store import RunSummary

WHOLE_ID = 32  # characters of a run's id


@click.command()
@click.argument("run")
@db_option
@dashboard_option
def cancel(run: str, db_url: str, address: str | None) -> None:
    """End RUN for good and keep its answers.

    The run may be driven by any process, here or elsewhere; `cancel` returns when that has stopped. A
    cancelled run cannot be resumed: to stop a run that is to go on later, press Ctrl-C where it runs.

    A detached run that its driver has not created in the database yet is stopped in its Ray cluster, if RUN is
    its whole id and --address or RAY_ADDRESS says which cluster that is.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`.

    \b
    Examples:
      harp-batch cancel latest
      harp-batch cancel 3f2a9c01b5d84e7fa6c2908d1e4b7f35 --address http://127.0.0.1:8265
    """
    with display() as screen:
        report = ProgressReport(screen)
        try:
            ended: RunSummary | None = _cancel(run, db_url, report)
        except (RunNotFound, DatabaseError):
            if not _stopped_in_the_cluster(run, address, report):
                raise
            ended = _cancel_if_known(run, db_url, report)
    if ended is not None:
        click.echo(ending(ended, typed_again(click.get_current_context(), "db")), err=True)


def _cancel(run: str, db_url: str, report: ProgressReport) -> RunSummary:
    from harp_batch import service

    report.phase(f"cancelling {run}")
    return service.cancel(run, db_url=db_url, observer=report)


def _cancel_if_known(run: str, db_url: str, report: ProgressReport) -> RunSummary | None:
    """Cancel what the driver, now stopped, may have created meanwhile; None where there is no such run."""
    from harp_batch.store.database import is_sqlite, parse_url, sqlite_path

    url = parse_url(db_url)
    if not is_sqlite(url) or sqlite_path(url).exists():  # else the driver was to make it
        with suppress(RunNotFound):
            return _cancel(run, db_url, report)
    click.echo(f"the driver of run {run} is stopped before it created the run", err=True)
    return None


def _stopped_in_the_cluster(run: str, address: str | None, report: ProgressReport) -> bool:
    """Whether the named cluster had a job of that run, which is stopped now."""
    from harp_batch.cluster.jobs import Jobs, default_address

    if len(run) != WHOLE_ID or not (address or default_address()):
        return False
    jobs = Jobs(address)
    job = jobs.newest(run)
    if job is None:
        return False
    report.phase(f"stopping the job {job}")
    jobs.stop(job)
    return True
