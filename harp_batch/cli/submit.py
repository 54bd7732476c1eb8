"""``harp-batch submit``: a job file becomes a run."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harp_batch.cli.options import address_option, data_dir_option, db_option, detach_option
from harp_batch.cli.output import write_rows
from harp_batch.cli.progress import ProgressReport, display
from harp_batch.cli.running import attend

if TYPE_CHECKING:
    from harp_batch.job import JobSpec


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a key of the job, as in cluster.actors=2 or methods.1.harp.theta=1.5; may be repeated.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N documents of a task."
)
@data_dir_option
@db_option
@address_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the job and the database, not the cluster's resources; show what would run, then stop.",
)
@detach_option
@click.option("--run-id", hidden=True, help="The id that `--detach` has promised.")
def submit(
    job: Path,
    overrides: tuple[str, ...],
    limit: int | None,
    data_dir: Path | None,
    db_url: str,
    address: str | None,
    dry_run: bool,
    detach: bool,
    run_id: str | None,
) -> None:
    """Run the job file JOB and show its results.

    Bad input is refused before anything starts. Every finished answer is in the database at once:
    after an interruption `harp-batch resume RUN` decodes only what is missing.

    With --detach the run is handed to a Ray cluster, and its id is printed. The driver is then a job on the
    head node: the program must be on the PATH there, and a SQLite file, a data folder and models that are
    files must be where they are here. A password in the database's URL can be read by whoever may use the
    cluster's dashboard.

    \b
    Examples:
      harp-batch submit jobs/demo.yaml
      harp-batch submit jobs/gsm8k.yaml --limit 40 --set cluster.actors=2 --data-dir datasets
      harp-batch submit jobs/gsm8k.yaml --detach --address http://127.0.0.1:8265
    """
    from harp_batch.job import load_job

    spec = load_job(job, overrides=overrides, limit=limit)
    if dry_run:
        _show_plan(spec, data_dir, db_url)
    elif detach:
        _detach(spec, data_dir, db_url, address)
    else:
        from harp_batch import service

        attend(
            lambda observer: service.submit(
                spec, data_dir=data_dir, db_url=db_url, address=address, observer=observer, run_id=run_id
            ),
            db_url,
        )


def _detach(spec: JobSpec, data_dir: Path | None, db_url: str, address: str | None) -> None:
    from harp_batch.cli.detach import data_dir_arguments, job_for_a_driver, send
    from harp_batch.cluster.jobs import JOB_FILE
    from harp_batch.store import migrate

    migrate.require_usable(db_url)
    run_id = uuid.uuid4().hex
    arguments = ["submit", JOB_FILE, "--run-id", run_id, *data_dir_arguments(data_dir)]
    send(spec.name, run_id, arguments, db_url=db_url, address=address, job_yaml=job_for_a_driver(spec))


def _show_plan(spec: JobSpec, data_dir: Path | None, db_url: str) -> None:
    from harp_batch import service
    from harp_batch.store import migrate

    migrate.require_usable(db_url)
    with display() as screen:
        plan = service.plan(spec, data_dir, ProgressReport(screen))
    rows = [[e.model, e.task, e.method, e.requests] for e in plan.run.evaluations]
    write_rows(["model", "task", "method", "documents"], rows, "table")
    click.echo(
        "dry run: the job is sound and the database usable, nothing was stored or started; "
        "whether the cluster has the resources is not checked",
        err=True,
    )
