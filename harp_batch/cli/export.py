"""``harp-batch export``: a run's answers as a file that can be compared with another run's."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from harp_batch.cli.failures import INCOMPLETE
from harp_batch.cli.options import db_option
from harp_batch.cli.status import short_id
from harp_batch.errors import HarpBatchError, UserError


@click.command()
@click.argument("run")
@click.option(
    "--canonical", is_flag=True, help="Write the canonical form; required, as no other is there yet."
)
@click.option(
    "-o",
    "--output",
    "path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write to FILE, whole or not at all, and its checksum to stdout.",
)
@db_option
def export(run: str, canonical: bool, path: Path | None, db_url: str) -> None:
    """Write every answer of RUN, with its trace, as JSON Lines.

    The canonical form is ordered and names no run, time or worker: on CPUs of one kind the same job gives the same
    SHA-256, whatever the number of actors, slots and interruptions. It is said on stderr as `sha256 HEX`, and with
    -o on stdout as `HEX  FILE`, which `sha256sum -c` takes.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`. Of an
    unfinished run the answers that are there are written, with exit code 3.

    \b
    Examples:
      harp-batch export latest --canonical -o answers.jsonl
      harp-batch export gsm8k --canonical | gzip > gsm8k.jsonl.gz
    """
    if not canonical:
        raise click.UsageError("the canonical form is the only one that can be exported yet: add --canonical")
    from harp_batch.store import open_store
    from harp_batch.store.canonical import canonical_lines

    with open_store(db_url, create=False, read_only=True) as store:
        found = store.find_run(run)
        lines = canonical_lines(store, found.id)
        written = _to_stdout(lines) if path is None else _to_file(lines, path)
    missing = found.requests - (written - 1)  # the first line is the header
    if missing:
        click.echo(
            f"{missing} of {found.requests} answers of run {found.name} ({short_id(found)}) are missing; "
            f"`harp-batch resume {short_id(found)}` computes them",
            err=True,
        )
        click.get_current_context().exit(INCOMPLETE)


def _to_stdout(lines: Iterable[bytes]) -> int:
    """Write the lines, and their SHA-256 to stderr; returns how many they were."""
    sha256, count = _copy(lines, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    click.echo(f"sha256 {sha256}", err=True)
    return count


def _to_file(lines: Iterable[bytes], path: Path) -> int:
    """Write the lines to a file, and its SHA-256 to stdout; returns how many they were."""
    with _becoming(path) as file:
        sha256, count = _copy(lines, file)
    click.echo(_checksum_line(sha256, os.fsencode(path)))
    return count


def _copy(lines: Iterable[bytes], out: BinaryIO) -> tuple[str, int]:
    digest, count = hashlib.sha256(), 0
    for line in lines:
        out.write(line)
        digest.update(line)
        count += 1
    return digest.hexdigest(), count


@contextmanager
def _becoming(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends well, and is removed when it does not."""
    target = Path(os.path.realpath(path))  # a link stays a link
    part = target.with_name(f".harp-batch-{secrets.token_hex(4)}.part")
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"{path} is no regular file; name another, or leave -o out to write to stdout")
        file = part.open("xb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder of yours"
        ) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise HarpBatchError(
            f"{path} could not be written ({error.strerror}); mend that and try again"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _checksum_line(sha256: str, name: bytes) -> bytes:
    """As sha256sum writes it: a name with a backslash or a line break is escaped, and the line says so."""
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"" if escaped == name else b"\\") + sha256.encode() + b"  " + escaped
