"""Every way a command can end badly, as one sentence on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.exceptions import Exit

from harp_batch.errors import HarpBatchError

INCOMPLETE = 3
INTERRUPTED = 130


@contextmanager
def clean_exits() -> Iterator[None]:
    """Turn what a command raises into a sentence and click's `Exit`; click's own errors pass."""
    try:
        yield
    except (click.ClickException, click.Abort, Exit):
        raise
    except HarpBatchError as error:
        raise _failure(str(error), error.exit_code) from error
    except KeyboardInterrupt as error:
        raise _failure("interrupted", INTERRUPTED) from error
    except BrokenPipeError as error:
        stop_writing()
        raise Exit(0) from error
    except Exception as error:
        raise _failure(_unexpected(error), INCOMPLETE) from error


def stop_writing() -> None:
    """Let later writes go nowhere: the reader of stdout has what it wanted (``| head``)."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is no file, so nothing can be flushed into it at exit
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it lives as long as the process)


def _failure(sentence: str, exit_code: int) -> Exit:
    click.echo(f"Error: {sentence}", err=True)
    return Exit(exit_code)


def _unexpected(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    if os.environ.get("HARP_BATCH_DEBUG", "0") not in ("", "0"):
        click.echo(text, err=True)
    return (
        f"unexpected {type(error).__name__}: {_first_line(error)}; this is a bug in harp-batch, "
        f"please report it with the traceback in {_log(text)} (HARP_BATCH_DEBUG=1 shows it here)"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def _log(text: str) -> str:
    with tempfile.NamedTemporaryFile(
        "w", prefix="harp-batch-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return file.name
