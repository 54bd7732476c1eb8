"""What `submit` and `resume` share: watch a run, show its results, exit as it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from harp_batch.cli.failures import INCOMPLETE, INTERRUPTED
from harp_batch.cli.options import typed_again
from harp_batch.cli.progress import ProgressReport, display
from harp_batch.cli.results import show_results
from harp_batch.cli.status import short_id
from harp_batch.records import RunStatus

if TYPE_CHECKING:
    from harp_batch.service.progress import Observer
    from harp_batch.store import RunSummary

EXIT_CODES = {RunStatus.DONE: 0, RunStatus.INTERRUPTED: INTERRUPTED}


def attend(work: Callable[[Observer], RunSummary], db_url: str) -> None:
    """Do the work with progress on stderr, then results on stdout and the next commands on stderr."""
    with display() as screen:
        run = work(ProgressReport(screen))
    if run.status is RunStatus.DONE:
        show_results(db_url, run.id, "table")
    context = click.get_current_context()
    click.echo(ending(run, typed_again(context, "db")), err=True)
    context.exit(EXIT_CODES.get(run.status, INCOMPLETE))


def ending(run: RunSummary, db_option: str = "") -> str:
    """How the run ended, and the commands one would type next."""
    return "\n".join([_sentence(run), "", *(f"  {command}{db_option}" for command in _next_commands(run))])


def _sentence(run: RunSummary) -> str:
    errors = f", {run.errors} of them errors" if run.errors else ""
    reason = f": {run.error}" if run.error else ""
    return f"run {run.name} ({short_id(run)}) is {run.status}, {run.answered} of {run.requests} answers{errors}{reason}"


def _next_commands(run: RunSummary) -> list[str]:
    answers = f"select * from answers where run_id = '{run.id}'"  # noqa: S608 (only shown)
    match run.status:
        case RunStatus.DONE:
            return [f"harp-batch results {short_id(run)}", f'harp-batch query "{answers} and not correct"']
        case RunStatus.CANCELLED:
            return [f'harp-batch query "{answers}"']
    return [f"harp-batch resume {short_id(run)}"]
