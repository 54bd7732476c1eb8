"""Options that several commands share, each with one meaning everywhere."""

from __future__ import annotations

from pathlib import Path

import click

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
    help="A running Ray cluster (auto, HOST:PORT or ray://HOST:PORT); without it "
    "RAY_ADDRESS, else one is started here.",
)

format_option = click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="table is for people; json and csv hold every column, unrounded.",
)
