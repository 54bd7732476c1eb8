"""The ``harp-batch`` group: every command below it ends cleanly."""

from __future__ import annotations

from typing import Any

import click

from harp_batch import __version__
from harp_batch.cli.cancel import cancel
from harp_batch.cli.completion import completion
from harp_batch.cli.db import db
from harp_batch.cli.doctor import doctor
from harp_batch.cli.export import export
from harp_batch.cli.failures import clean_exits
from harp_batch.cli.logs import logs
from harp_batch.cli.models import models
from harp_batch.cli.output import escape_what_cannot_be_encoded
from harp_batch.cli.query import query
from harp_batch.cli.results import results
from harp_batch.cli.resume import resume
from harp_batch.cli.status import status
from harp_batch.cli.submit import submit


class App(click.Group):
    """A group whose commands fail with a sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        with clean_exits():
            return super().invoke(ctx)


@click.group(
    cls=App,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 2 the input was wrong, 3 the run failed or is incomplete, 130 interrupted.",
)
@click.version_option(__version__, prog_name="harp-batch")
def app() -> None:
    """Evaluate HARP decoding on benchmarks: from a job file to answers in SQL.

    \b
    harp-batch submit jobs/demo.yaml      run it and see the results
    harp-batch results latest             see them again
    harp-batch query "select * from answers where not correct"
    """


for command in (submit, resume, cancel, status, logs, results, query, export, db, models, doctor, completion):
    app.add_command(command)


def main() -> None:
    """Run the ``harp-batch`` program and exit with its code."""
    escape_what_cannot_be_encoded()
    app(prog_name="harp-batch")
