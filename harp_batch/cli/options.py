"""Options that several commands share, each with one meaning everywhere."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from click.core import ParameterSource

DEFAULT_DB = "sqlite:///harp-batch.db"

db_option = click.option(
    "--db",
    "db_url",
    metavar="URL",
    envvar="HARP_BATCH_DB",
    default=DEFAULT_DB,
    show_default=True,
    show_envvar=True,
    help="Database: sqlite:///FILE or postgresql://USER@HOST/NAME.",
)

data_dir_option = click.option(
    "--data-dir",
    metavar="DIR",
    envvar="HARP_BATCH_DATA_DIR",
    show_envvar=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of TASK/SPLIT.jsonl files that replace the hub's data.",
)

address_option = click.option(
    "--address",
    metavar="RAY",
    help="A running Ray cluster: auto, HOST:6379 or, with --detach, its dashboard http://HOST:8265. "
    "Without it RAY_ADDRESS; else one is started here (with --detach: the one that runs here).",
)

dashboard_option = click.option(
    "--address",
    metavar="RAY",
    help="The Ray cluster that the run was handed to: its dashboard http://HOST:8265, HOST:6379 or auto. "
    "Without it RAY_ADDRESS.",
)

detach_option = click.option(
    "--detach",
    is_flag=True,
    help="Let the Ray cluster drive the run, through its Jobs API, and return at once.",
)

format_option = click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="table is for people; json and csv hold every column, unrounded.",
)


def typed_again(context: click.Context, *names: str) -> str:
    """Those of the options ``db`` and ``address`` that were typed, for the next command; never a password.

    What the environment or a default says need not be repeated.
    """
    typed = [n for n in names if context.get_parameter_source(_PARAMETERS[n]) is ParameterSource.COMMANDLINE]
    return "".join(f" --{name} {shlex.quote(_shown(context, name))}" for name in typed)


_PARAMETERS = {"db": "db_url", "address": "address"}


def _shown(context: click.Context, name: str) -> str:
    value: str = context.params[_PARAMETERS[name]]
    if name != "db":
        return value
    from harp_batch.store.database import parse_url, show

    return show(parse_url(value))
