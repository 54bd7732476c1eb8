"""`submit` end to end beside the bare engine: what Ray, the driver, scoring and the database cost."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding.drive import answer_all
from benchmarks.decoding.options import Options
from benchmarks.decoding.report import Part, Ratio, quotient, value_of
from benchmarks.decoding.turns import Contender, Made, take_turns
from harp_batch import service
from harp_batch.decode import Engine, Greedy
from harp_batch.job import JobSpec, parse_job
from harp_batch.models import LocalModel, load_model, load_tokenizer
from harp_batch.records import Request, RunStatus
from harp_batch.service import Progress

_GOAL = 0.9
_SUBMIT, _BARE = "submit, one actor, SQLite", "harp-batch engine alone"
_NOTE = (
    "`submit` is timed from the first sign of its actor, which comes up to a quarter of a second after the "
    "model is loaded, until the last answer is committed; the model of the bare engine is loaded, too."
)


def measure(options: Options) -> Part:
    """Answers a second of both, the same requests on as many threads."""
    spec = _job(options)
    plan = service.plan(spec, options.data_dir)
    (evaluation,) = plan.run.evaluations
    requests = plan.requests(evaluation)
    local = plan.models[options.model]
    contenders = [
        _submitted(spec, options, len(requests)),
        _bare(local, requests, options),
    ]
    figures = tuple(take_turns(contenders))
    workload = {
        "model": options.model,
        "dtype": options.dtype,
        "task": evaluation.task,
        "documents": len(requests),
        "at most new tokens": options.sizes.new_tokens,
        "slots": options.sizes.slots,
    }
    ratio = quotient(value_of(figures, _SUBMIT), value_of(figures, _BARE))
    return Part(
        "submit", workload, figures, (Ratio("`submit` end to end / bare engine", ratio, _GOAL),), (_NOTE,)
    )


def _job(options: Options) -> JobSpec:
    task = {"task": "gsm8k" if options.data_dir else "demo_arithmetic", "num_fewshot": 0}
    job = {
        "name": "benchmark",
        "models": [{"ref": options.model, "dtype": options.dtype}],
        "tasks": [task | {"limit": options.sizes.documents}],
        "methods": ["greedy"],
        "generation": {"max_new_tokens": options.sizes.new_tokens},
        "cluster": {"actors": 1, "slots": options.sizes.slots},
    }
    return parse_job(json.dumps(job, indent=1), "the benchmark's job")  # JSON is YAML


class _Watch(service.Silent):
    """Notes when the actor was there first and when everything was committed."""

    def __init__(self) -> None:
        self.ready: float | None = None
        self.committed: float | None = None

    def progress(self, progress: Progress) -> None:
        now = time.perf_counter()
        if self.ready is None and progress.actors:
            self.ready = now
        if self.committed is None and all(e.done == e.total for e in progress.evaluations):
            self.committed = now

    def seconds(self) -> float:
        """From the one to the other."""
        assert self.ready is not None
        assert self.committed is not None
        return self.committed - self.ready


def _submitted(spec: JobSpec, options: Options, count: int) -> Contender:
    def run() -> Made:
        watch = _Watch()
        with tempfile.TemporaryDirectory(prefix="harp-batch-") as folder:
            url = f"sqlite:///{Path(folder) / 'benchmark.db'}"
            summary = service.submit(spec, db_url=url, data_dir=options.data_dir, observer=watch)
        if summary.status is not RunStatus.DONE or summary.errors:
            raise RuntimeError(f"the run ended as {summary.status} with {summary.errors} errors")
        return Made(count, seconds=watch.seconds())

    return Contender(_SUBMIT, run, options.sizes.rounds, f"{count} documents", "answers/s")


def _bare(local: LocalModel, requests: Sequence[Request], options: Options) -> Contender:
    tokenizer: Any = load_tokenizer(local)
    model = load_model(local, dtype=options.dtype, device=options.device)
    engine = Engine(model, tokenizer=tokenizer, slots=options.sizes.slots)

    def run() -> Made:
        answer_all(engine, requests, Greedy())
        return Made(len(requests))

    work = f"{len(requests)} documents, {torch.get_num_threads()} threads"
    return Contender(_BARE, run, options.sizes.rounds, work, "answers/s")
