"""``harp-batch db``: the database's schema."""

from __future__ import annotations

import click

from harp_batch.cli.failures import INCOMPLETE
from harp_batch.cli.options import db_option
from harp_batch.cli.output import write

SENTENCES = {
    "empty": "the database is empty; the first `harp-batch submit` makes its tables",
    "current": "the database's schema is current",
    "behind": "the database's schema is older than this harp-batch; run `harp-batch db upgrade`",
    "newer": "the database's schema is newer than this harp-batch; upgrade harp-batch",
}


@click.group()
def db() -> None:
    """Upgrade or check the database."""


@db.command()
@db_option
def upgrade(db_url: str) -> None:
    """Bring the database to this version's schema; its data stay.

    \b
    Examples:
      harp-batch db upgrade
      harp-batch db upgrade --db postgresql://me@db.example.org/harp
    """
    from harp_batch.store import migrate

    migrate.upgrade(db_url)
    write(SENTENCES["current"])


@db.command()
@db_option
def check(db_url: str) -> None:
    """Say whether the database fits this version.

    Exit code 3 where it does not.

    \b
    Examples:
      harp-batch db check
      harp-batch db check || harp-batch db upgrade
    """
    from harp_batch.store import migrate

    state = migrate.check(db_url)
    write(SENTENCES[state])
    if state in ("behind", "newer"):
        click.get_current_context().exit(INCOMPLETE)
