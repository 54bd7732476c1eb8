"""``harp-batch logs``: what a detached run's driver has written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from harp_batch.cli.options import dashboard_option, db_option

if TYPE_CHECKING:
    from harp_batch.cluster.jobs import Jobs


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the driver has ended.")
@db_option
@dashboard_option
def logs(run: str, follow: bool, db_url: str, address: str | None) -> None:
    """Print the log of RUN, which was submitted or resumed with --detach.

    The log is the cluster's: it is there as long as the cluster is. A run that was resumed has a log for
    every driver; the newest is shown. Where no cluster is named, the one that runs here is asked.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`.

    \b
    Examples:
      harp-batch logs latest
      harp-batch logs 3f2a9c01 --follow --address http://127.0.0.1:8265
    """
    from harp_batch.cluster.jobs import Jobs

    jobs = Jobs(address)
    job = _job_of(run, jobs, db_url)
    if follow:
        jobs.follow(job, lambda piece: click.echo(piece, nl=False))
    else:
        click.echo(jobs.log(job), nl=False)
    if obstacle := jobs.obstacle(job):
        click.echo(obstacle, err=True)


def _job_of(run: str, jobs: Jobs, db_url: str) -> str:
    """The newest job of the run; one that the database does not know yet is known by its id."""
    from harp_batch.errors import RunNotFound, UserError
    from harp_batch.store import open_store

    try:
        with open_store(db_url, create=False, read_only=True) as store:
            run_id = store.find_run(run).id
    except UserError:
        job = jobs.newest(run)
        if job is None:
            raise
        return job
    job = jobs.newest(run_id)
    if job is None:
        raise RunNotFound(
            f"the Ray cluster at {jobs.address} has no job of the run {run_id[:8]}: only runs that were "
            "started there with --detach have a log"
        )
    return job
