"""Writes docs/cli.md from the commands themselves: `make docs`. A test compares the two."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from harp_batch.cli.app import app

HEAD = """# The command line

Written by `make docs` from `harp-batch --help` and the help of every command.
"""


def commands(
    command: click.Command, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The command and all commands below it."""
    yield path, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from commands(command.commands[name], (*path, name))


def section(path: tuple[str, ...], command: click.Command) -> str:
    """One command's help under a heading."""
    settings = {**app.context_settings, "terminal_width": 88, "max_content_width": 88}
    context = click.Context(command, info_name=" ".join(path), **settings)
    return f"## `{' '.join(path)}`\n\n```text\n{command.get_help(context)}\n```\n"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(path, command) for path, command in commands(app, ("harp-batch",)))])


if __name__ == "__main__":
    sys.stdout.write(page())
