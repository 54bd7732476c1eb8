"""``harp-batch doctor``: is everything here that a run needs?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harp_batch.cli.failures import INCOMPLETE
from harp_batch.cli.options import data_dir_option, db_option, format_option
from harp_batch.cli.output import write, write_rows

if TYPE_CHECKING:
    from harp_batch.cli.checks import Check

COLUMNS = ("check", "level", "finding", "mend")


@click.command()
@db_option
@data_dir_option
@format_option
def doctor(db_url: str, data_dir: Path | None, style: str) -> None:
    """Check that everything a run needs is here.

    That is Python, the libraries, the database, the cache folder, the demo's model and the data. Each line
    says ok, warn or fail, and how to mend what is not ok. Exit code 3 where something fails.

    \b
    Examples:
      harp-batch doctor
      harp-batch doctor --db postgresql://me@db.example.org/harp --data-dir datasets
    """
    from harp_batch.cli.checks import Level, all_checks

    found: list[Check] = []
    for check in all_checks(db_url, data_dir):
        found.append(check)
        if style == "table":
            write(line(check))
    if style != "table":
        write_rows(COLUMNS, [[c.what, str(c.level), c.finding, c.mend or None] for c in found], style)
    if any(check.level is Level.FAIL for check in found):
        click.get_current_context().exit(INCOMPLETE)


def line(check: Check) -> str:
    """``ok    python        3.11.7 ...``, with the mend on a line below."""
    text = f"{check.level:<5} {check.what:<13} {check.finding}"
    return f"{text}\n{'':<19} -> {check.mend}" if check.mend else text
