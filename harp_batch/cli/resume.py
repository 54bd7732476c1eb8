"""``harp-batch resume``: decode what a run is still missing."""

from __future__ import annotations

from pathlib import Path

import click

from harp_batch.cli.options import address_option, data_dir_option, db_option
from harp_batch.cli.running import attend


@click.command()
@click.argument("run")
@data_dir_option
@db_option
@address_option
def resume(run: str, data_dir: Path | None, db_url: str, address: str | None) -> None:
    """Decode what RUN is still missing.

    No answer that is in the database is computed again.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`.

    \b
    Examples:
      harp-batch resume latest
      harp-batch resume gsm8k --address auto
    """
    from harp_batch import service

    attend(
        lambda observer: service.resume(
            run, data_dir=data_dir, db_url=db_url, address=address, observer=observer
        ),
        db_url,
    )
