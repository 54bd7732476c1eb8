"""``harp-batch resume``: decode what a run is still missing."""

from __future__ import annotations

from pathlib import Path

import click

from harp_batch.cli.options import address_option, data_dir_option, db_option, detach_option
from harp_batch.cli.progress import ProgressReport, display
from harp_batch.cli.running import attend
from harp_batch.cli.status import short_id
from harp_batch.errors import UserError
from harp_batch.records import RunStatus


@click.command()
@click.argument("run")
@data_dir_option
@db_option
@address_option
@detach_option
def resume(run: str, data_dir: Path | None, db_url: str, address: str | None, detach: bool) -> None:
    """Decode what RUN is still missing.

    No answer that is in the database is computed again. --detach hands the run to a Ray cluster, as `submit`
    does, however it began.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`.

    \b
    Examples:
      harp-batch resume latest
      harp-batch resume gsm8k --address auto --detach
    """
    if detach:
        _detach(run, data_dir, db_url, address)
        return
    from harp_batch import service

    attend(
        lambda observer: service.resume(
            run, data_dir=data_dir, db_url=db_url, address=address, observer=observer
        ),
        db_url,
    )


def _detach(run: str, data_dir: Path | None, db_url: str, address: str | None) -> None:
    """Refuse here what the driver in the cluster would refuse where nobody looks, then send it."""
    from harp_batch import service
    from harp_batch.cli.detach import data_dir_arguments, send
    from harp_batch.store import open_store

    with open_store(db_url, create=False, read_only=True) as store, display() as screen:
        found = store.find_run(run)
        if found.status is RunStatus.DONE:
            raise UserError(f"run {found.name} ({short_id(found)}) is done: there is nothing to resume")
        service.require_resumable(store, found, ProgressReport(screen).phase)
    arguments = ["resume", found.id, *data_dir_arguments(data_dir)]
    send(found.name, found.id, arguments, db_url=db_url, address=address)
