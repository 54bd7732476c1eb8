"""One back end: how fast answers go in, how much room they take, how soon results are there."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.decoding.report import Part, Ratio
from benchmarks.decoding.turns import Figure
from benchmarks.storing import workload
from benchmarks.storing.databases import Databases
from harp_batch.records import Answer
from harp_batch.store import RunRecord, Store, open_store

_ASKED = 5  # times that the results are read
_RESULTS_GOAL = 1.0  # seconds, for a run of a million tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work it is."""

    answers: int
    tokens: int  # of each answer
    batches: tuple[int, ...]  # answers a transaction
    rounds: int

    @property
    def total(self) -> int:
        """Trace tokens of a round."""
        return self.answers * self.tokens


@dataclass(frozen=True, slots=True)
class Round:
    """What one round found."""

    tokens_per_second: float
    bytes_per_token: float
    results_seconds: float


def measure(databases: Databases, sizes: Sizes) -> Part:
    """All rounds of all batch sizes, which take turns."""
    run = workload.a_run(sizes.answers)
    answers = workload.answers(run, sizes.tokens)
    rounds: dict[int, list[Round]] = {batch: [] for batch in sizes.batches}
    for number in range(sizes.rounds):
        for batch in sizes.batches:
            found = _round(databases, run, answers, batch)
            rounds[batch].append(found)
            print(
                f"round {number + 1}: {databases.name}, {batch} answers a transaction: "
                f"{found.tokens_per_second:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    work = {"answers": sizes.answers, "tokens each": sizes.tokens, **databases.facts()}
    return Part(databases.name, work, tuple(_figures(sizes, rounds)), tuple(_ratios(databases, rounds)))


def _round(databases: Databases, run: RunRecord, answers: Sequence[Answer], batch: int) -> Round:
    url = databases.fresh()
    tokens = sum(len(answer.trace) for answer in answers)
    with open_store(url) as store:
        store.create_run(run)
        before = databases.weigh(url)
        seconds = _ingest(store, run, answers, batch)
        store.save_metrics(run.id, workload.metrics(run))
        results = statistics.median(_results_seconds(store, run) for _ in range(_ASKED))
    return Round(tokens / seconds, (databases.weigh(url) - before) / tokens, results)


def _ingest(store: Store, run: RunRecord, answers: Sequence[Answer], batch: int) -> float:
    """As a run's driver does it: each transaction makes sure that the run is still its own."""
    attempt = store.acquire(run.id, "benchmark", 1, stale_after=60)
    started = time.perf_counter()
    for start in range(0, len(answers), batch):
        store.commit(answers[start : start + batch], attempt)
    return time.perf_counter() - started


def _results_seconds(store: Store, run: RunRecord) -> float:
    started = time.perf_counter()
    if len(store.results(run.id)) != len(workload.metrics(run)):
        raise AssertionError("the view has not the rows that were stored")
    return time.perf_counter() - started


def _figures(sizes: Sizes, rounds: dict[int, list[Round]]) -> list[Figure]:
    figures = []
    for batch, found in rounds.items():
        name = f"{batch} answers a transaction"
        work = f"{sizes.total} tokens"
        figures += [
            Figure(f"ingest, {name}", "tokens/s", work, tuple(r.tokens_per_second for r in found)),
            Figure(f"on disk, {name}", "bytes/token", work, tuple(r.bytes_per_token for r in found)),
            Figure(f"results, {name}", "s", work, tuple(r.results_seconds for r in found)),
        ]
    return figures


def _ratios(databases: Databases, rounds: dict[int, list[Round]]) -> list[Ratio]:
    """Each batch size beside the goals; the medians of its rounds."""
    ratios = []
    for batch, found in rounds.items():
        name = f"{databases.name}, {batch} answers a transaction"
        rate = statistics.median(r.tokens_per_second for r in found) / 1000
        size = statistics.median(r.bytes_per_token for r in found)
        results = statistics.median(r.results_seconds for r in found)
        ratios += [
            Ratio(f"{name}: thousand tokens/s", rate, databases.thousand_tokens),
            Ratio(f"{name}: bytes/token", size, databases.bytes_a_token, at_most=True),
            Ratio(f"{name}: seconds of results", results, _RESULTS_GOAL, at_most=True),
        ]
    return ratios
