"""``harp-batch status``: which runs there are and how far they got."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from harp_batch.cli import numbers
from harp_batch.cli.options import db_option, format_option, typed_again
from harp_batch.cli.output import write, write_rows
from harp_batch.cli.standing import Standing

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


# Of one run there is more to tell.
MORE = ("heartbeat_age", "in_doubt", "state", "attempts")


@click.command()
@click.argument("run", required=False)
@db_option
@format_option
def status(run: str | None, db_url: str, style: str) -> None:
    """Show how far RUN is, or the newest 50 runs, the newest first.

    Of one run it shows evaluations, actors, attempts, rate, losses and errors as its driver, wherever that
    is, wrote them down seconds ago. `running?` says that no driver has been heard from for 15 s.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`.

    \b
    Examples:
      harp-batch status
      harp-batch status latest
      harp-batch status latest --format json
    """
    from harp_batch.store import open_store

    with open_store(db_url, create=False, read_only=True) as store:
        if run:
            found = store.find_run(run)
            _show_one(Standing.of(found, store.attempts(found.id)), style)
        else:
            _show_all(store.runs(), style)


def _show_all(runs: list[RunSummary], style: str) -> None:
    if style == "table":
        write_rows(*people_table(runs), style)
    else:
        records = [asdict(r) for r in runs]
        write_rows(COLUMNS, [[record[c] for c in COLUMNS] for record in records], style)


def _show_one(standing: Standing, style: str) -> None:
    if style != "table":
        record = standing.record()
        everything = COLUMNS + MORE
        write_rows(everything, [[record[c] for c in everything]], style)
        return
    columns, [row] = people_table([standing.run])
    row[columns.index("status")] += "?" * standing.in_doubt
    write_rows(columns, [row], style)
    if text := standing.text():
        write("\n" + text)
    if standing.in_doubt:
        resume = f"harp-batch resume {short_id(standing.run)}"
        again = typed_again(click.get_current_context(), "db")
        click.echo(
            f"nobody is heard to drive this run; if its driver is gone, go on with `{resume}{again}`",
            err=True,
        )


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
