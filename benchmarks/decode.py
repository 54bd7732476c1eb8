"""Decoding speed, side by side in one process: ratios, because machines differ.

    python benchmarks/decode.py --data-dir DATASETS      # the whole table: about an hour on two cores
    python benchmarks/decode.py --quick                  # a look, in about three minutes
    python benchmarks/decode.py --only limits --only submit --data-dir DATASETS
    python benchmarks/decode.py --random llama-8b        # on a GPU: an 8B shape with random weights
    python benchmarks/decode.py --json decode.json --markdown decode.md

Parts: generation (it takes most of the time), loglikelihood, limits, submit and memory. The contenders of a part take
turns, and each figure is the median of the rounds; the plain loops (the authors' way: one prompt, no cache) and HARP
with a mask a step are slow and take fewer turns. A contender that cannot run here is in the table with the reason.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.decoding.machine import facts
from benchmarks.decoding.options import Options, parse
from benchmarks.decoding.report import Part, as_json, as_markdown, as_text
from benchmarks.decoding.subjects import subject
from harp_batch.decode.process import prepare_process
from harp_batch.errors import HarpBatchError


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the files that were asked for."""
    options = parse(__doc__, arguments)
    prepare_process(
        os.cpu_count() or 1
    )  # as an actor that has the machine to itself; all contenders share it
    try:
        machine = facts(options.device)
        parts: list[Part] = []
        for name in options.parts:
            parts += _measure(name, options)
            gc.collect()  # the models of one part are gone before the next begins
            _write(machine, parts, options)  # after every part: a later one may break
    except HarpBatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(as_text(machine, parts, options.caveat))


def _write(machine: dict[str, Any], parts: Sequence[Part], options: Options) -> None:
    if options.json:
        document = as_json(machine, parts, options.caveat)
        options.json.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(as_markdown(machine, parts, options.caveat), encoding="utf-8")


def _measure(name: str, options: Options) -> list[Part]:
    """One part, which imports what it alone needs: a GPU machine may have no lm-eval and no Ray."""
    if name == "generation":
        from benchmarks.decoding import generation

        return [generation.measure(subject(options), options)]
    if name == "loglikelihood":
        from benchmarks.decoding import scoring

        return scoring.measure(options)
    if name == "limits":
        from benchmarks.decoding import limits

        return [limits.measure(subject(options), options)]
    if name == "submit":
        from benchmarks.decoding import service

        return [service.measure(options)]
    from benchmarks.decoding import memory

    return [memory.measure(options)]


if __name__ == "__main__":
    main()
