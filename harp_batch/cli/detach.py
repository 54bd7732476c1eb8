"""What ``submit --detach`` and ``resume --detach`` share: the driver goes to the Ray cluster as a job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harp_batch.cli.options import typed_again
from harp_batch.cli.output import write

if TYPE_CHECKING:
    from harp_batch.job import JobSpec


def send(
    name: str,
    run_id: str,
    arguments: list[str],
    *,
    db_url: str,
    address: str | None,
    job_yaml: str | None = None,
) -> None:
    """Hand the run to the cluster; print its id to stdout and the next commands to stderr."""
    from harp_batch.cluster.jobs import Errand, Jobs

    jobs = Jobs(address)
    jobs.submit(Errand(run_id, tuple(arguments), url_for_a_driver(db_url), job_yaml))
    write(run_id)
    click.echo(_what_next(name, run_id, jobs.address), err=True)


def url_for_a_driver(db_url: str) -> str:
    """The URL with its password, and a SQLite file by its absolute path: the driver works in another folder."""
    from harp_batch.store.database import is_sqlite, parse_url, sqlite_path

    url = parse_url(db_url)
    if is_sqlite(url):
        url = url.set(database=str(sqlite_path(url)))
    return url.render_as_string(hide_password=False)


def data_dir_arguments(data_dir: Path | None) -> list[str]:
    """``--data-dir`` with an absolute path, where there is one."""
    return [] if data_dir is None else ["--data-dir", str(data_dir.absolute())]


def job_for_a_driver(spec: JobSpec) -> str:
    """The job as YAML, overrides and limits applied; models that are files here get absolute paths."""
    models = tuple(model.model_copy(update={"ref": _absolute(model.ref)}) for model in spec.models)
    return spec.model_copy(update={"models": models}).to_yaml()


def _absolute(ref: str) -> str:
    path = Path(ref).expanduser()
    return str(path.resolve()) if path.is_dir() or (ref.endswith(".gguf") and path.is_file()) else ref


def _what_next(name: str, run_id: str, address: str) -> str:
    context = click.get_current_context()
    db, cluster = typed_again(context, "db"), typed_again(context, "address")
    short = run_id[:8]
    return "\n".join(
        [
            f"run {name} ({short}) was handed to the Ray cluster at {address}; "
            "`status` knows it as soon as its driver has built the requests",
            "",
            f"  harp-batch logs {short} --follow{cluster}{db}",
            f"  harp-batch status {short}{db}",
            f"  harp-batch cancel {short}{cluster}{db}",
        ]
    )
