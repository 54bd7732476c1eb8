"""``harp-batch status``: which runs there are and how far they got."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from harp_batch.cli import numbers
from harp_batch.cli.options import db_option, format_option
from harp_batch.cli.output import write_rows

if TYPE_CHECKING:
    from harp_batch.store import RunSummary

COLUMNS = (
    "id",
    "name",
    "status",
    "created_at",
    "finished_at",
    "evaluations",
    "requests",
    "answered",
    "errors",
    "error",
)


@click.command()
@click.argument("run", required=False)
@db_option
@format_option
def status(run: str | None, db_url: str, style: str) -> None:
    """Show how far RUN is, or the newest 50 runs, the newest first.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`.

    \b
    Examples:
      harp-batch status
      harp-batch status latest --format json
    """
    from harp_batch.store import open_store

    with open_store(db_url, create=False, read_only=True) as store:
        runs = [store.find_run(run)] if run else store.runs()
    if style == "table":
        write_rows(*people_table(runs), style)
    else:
        records = [asdict(r) for r in runs]
        write_rows(COLUMNS, [[record[c] for c in COLUMNS] for record in records], style)


def people_table(runs: list[RunSummary]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for people: times to the minute, answers as a share."""
    columns = ["run", "id", "status", "begun", "took", "answers", "errors", "reason"]
    return columns, [_row(run) for run in runs]


def short_id(run: RunSummary) -> str:
    """As much of a run's id as people need to name it."""
    return run.id[:8]


def _row(run: RunSummary) -> list[Any]:
    took = (run.finished_at - run.created_at).total_seconds() if run.finished_at else None
    return [
        run.name,
        short_id(run),
        str(run.status),
        f"{run.created_at.astimezone():%Y-%m-%d %H:%M}",
        numbers.duration(took),
        f"{run.answered}/{run.requests}",
        run.errors,
        run.error,
    ]
