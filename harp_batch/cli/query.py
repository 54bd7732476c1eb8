"""``harp-batch query``: SQL over the views, read-only."""

from __future__ import annotations

import click

from harp_batch.cli.options import db_option, format_option
from harp_batch.cli.output import write_rows


@click.command()
@click.argument("sql")
@db_option
@format_option
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    metavar="N",
    default=10_000,
    show_default=True,
    help="Stop after N rows and say so.",
)
def query(sql: str, db_url: str, style: str, max_rows: int) -> None:
    """Ask the database in SQL.

    SQL is one SELECT statement over the views `results`, `answers` and `tokens`. It can only read, and is
    stopped when it takes too long.

    \b
    Examples:
      harp-batch query "select method, count(*) from answers group by method"
      harp-batch query "select * from results" --format csv > results.csv
      harp-batch query "select avg(entropy) from tokens where hesitated" --format json
    """
    from harp_batch.store.query import run_query

    found = run_query(db_url, sql, max_rows=max_rows)
    write_rows(found.columns, found.rows, style)
    if found.truncated:
        click.echo(f"only the first {len(found.rows):,} rows are shown; --max-rows N shows more", err=True)
