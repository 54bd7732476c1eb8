"""``harp-batch results``: accuracy and speed of a run, each method beside the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from harp_batch.cli import numbers
from harp_batch.cli.options import db_option, format_option
from harp_batch.cli.output import UNDEFINED, terminal_width, text_table, write, write_rows

Row = Mapping[str, Any]

KEY = ("task", "method")
ACCURACY = ("metric", "value [95%]", "vs baseline [95%]", "p", "n")
SPEED = ("cost", "time", "tokens/s", "hesitates", "flips")
RIGHT = ("p", "n", *SPEED)


@click.command()
@click.argument("run")
@db_option
@format_option
def results(run: str, db_url: str, style: str) -> None:
    """Show accuracy and speed of RUN against its baseline.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`.
    In the table, differences of percentages are in points, cost is forward tokens and time is engine-busy
    seconds, both per output token and relative to the baseline; `-` means undefined. On a terminal too narrow
    for one table, cost and speed stand in a second one below.

    \b
    Examples:
      harp-batch results latest
      harp-batch results gsm8k --format csv > gsm8k.csv
    """
    show_results(db_url, run, style)


def show_results(db_url: str, run: str, style: str) -> None:
    """Write the results of a run to stdout; says on stderr where there are none yet."""
    from harp_batch.store import VIEWS, open_store

    with open_store(db_url, create=False, read_only=True) as store:
        rows = store.results(store.find_run(run).id)
    if style != "table":
        write_rows(VIEWS["results"], [[row[name] for name in VIEWS["results"]] for row in rows], style)
    elif rows:
        write(people_text(rows, terminal_width()))
    else:
        click.echo(f"no results yet: `harp-batch status {run}` says how far the run is", err=True)


def people_text(rows: Sequence[Row], width: int | None = None) -> str:
    """The tables of every model under a line that names it; ``width`` is the terminal's, None for no terminal."""
    models = dict.fromkeys(row["model"] for row in rows)
    parts = []
    for model in models:
        tables = _tables([row for row in rows if row["model"] == model], width)
        parts.append("\n\n".join([model, *tables]))
    return "\n\n".join(parts)


def _tables(rows: Sequence[Row], width: int | None) -> list[str]:
    """One wide table, or accuracy above cost and speed where the terminal is too narrow for it."""
    wide = _table((*KEY, *ACCURACY, *SPEED), [[*_key(r), *_accuracy(r), *_speed(r)] for r in rows])
    if width is None or max(map(len, wide.splitlines())) <= width:
        return [wide]
    evaluations = {(row["task"], row["method"]): row for row in rows}
    return [
        _table((*KEY, *ACCURACY), [[*_key(row), *_accuracy(row)] for row in rows]),
        _table((*KEY, *SPEED), [[*_key(row), *_speed(row)] for row in evaluations.values()]),
    ]


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return text_table(columns, cells, right=RIGHT)


def _key(row: Row) -> list[str]:
    return [row["task"], row["method"]]


def _accuracy(row: Row) -> list[str]:
    proportion = numbers.is_proportion(row["metric"])
    return [
        _metric(row),
        numbers.estimate(row["value"], row["ci_low"], row["ci_high"], proportion=proportion),
        _against_baseline(row, proportion=proportion),
        numbers.p_value(row["p_value"]),
        numbers.count(row["n"]),
    ]


def _speed(row: Row) -> list[str]:
    return [
        numbers.ratio(row["relative_cost"]),
        numbers.ratio(row["relative_time"]),
        numbers.rate(row["tokens_per_second"]),
        numbers.percent(row["hesitation_rate"]),
        numbers.percent(row["flip_rate"]),
    ]


def _metric(row: Row) -> str:
    return row["metric"] if row["filter"] in ("none", "", None) else f"{row['metric']} ({row['filter']})"


def _against_baseline(row: Row, *, proportion: bool) -> str:
    if row["method"] == row["baseline"]:
        return "baseline"
    if row["baseline"] is None:
        return UNDEFINED
    return numbers.difference(row["delta"], row["delta_ci_low"], row["delta_ci_high"], proportion=proportion)
