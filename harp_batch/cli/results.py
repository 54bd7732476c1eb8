"""``harp-batch results``: accuracy and speed of a run, each method beside the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from harp_batch.cli import numbers
from harp_batch.cli.options import db_option, format_option
from harp_batch.cli.output import UNDEFINED, write, write_rows

Row = Mapping[str, Any]

RIGHT = ("p", "n", "cost", "time", "tokens/s", "hesitates", "flips")


@click.command()
@click.argument("run")
@db_option
@format_option
def results(run: str, db_url: str, style: str) -> None:
    """Show accuracy and speed of RUN against its baseline.

    RUN is a run's id, a unique prefix of one, a run's name (the newest of that name) or `latest`.
    In the table, differences of percentages are in points, cost is forward tokens and time is engine-busy
    seconds, both per output token and relative to the baseline; `-` means undefined.

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
        write(people_text(rows))
    else:
        click.echo(f"no results yet: `harp-batch status {run}` says how far the run is", err=True)


def people_text(rows: Sequence[Row]) -> str:
    """One table a model, each under a line that names it."""
    from harp_batch.cli.output import text_table

    models = dict.fromkeys(row["model"] for row in rows)
    parts = []
    for model in models:
        columns, cells = people_table([row for row in rows if row["model"] == model])
        parts.append(f"{model}\n\n{text_table(columns, cells, right=RIGHT)}")
    return "\n\n".join(parts)


def people_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells for people: percentages with intervals, ratios as ``1.23x``."""
    columns = ["task", "method", "metric", "value [95%]", "vs baseline [95%]", *RIGHT]
    return columns, [_cells(row) for row in rows]


def _cells(row: Row) -> list[str]:
    proportion = numbers.is_proportion(row["metric"], row["value"])
    return [
        row["task"],
        row["method"],
        _metric(row),
        numbers.estimate(row["value"], row["ci_low"], row["ci_high"], proportion=proportion),
        _against_baseline(row, proportion=proportion),
        numbers.p_value(row["p_value"]),
        numbers.count(row["n"]),
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
