"""Driving the engine step by step, as an actor does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.decoding.subjects import SEED, Prompts
from harp_batch.decode import Engine, Method, RequestError
from harp_batch.records import Request, RequestKind


@dataclass(frozen=True, slots=True)
class Steps:
    """The engine's steps from the first request to the last outcome."""

    ends: tuple[float, ...]  # seconds on one clock, the start first
    finished: tuple[int, ...]  # outcomes of each step

    @property
    def first_finish(self) -> int:
        """Number of the first step with an outcome; steps are counted from 1."""
        return 1 + next(i for i, count in enumerate(self.finished) if count)

    @property
    def mean_finish(self) -> float:
        """Number of the step in which a request finished, on average."""
        return sum((i + 1) * n for i, n in enumerate(self.finished)) / sum(self.finished)

    def seconds(self, step: int) -> float:
        """How long a step took."""
        return self.ends[step] - self.ends[step - 1]


def answer_all(engine: Engine, requests: Sequence[Request], method: Method) -> tuple[dict[Any, Any], Steps]:
    """Outcomes by the request's place, and the steps. Raises RuntimeError where the engine refuses a request."""
    for place, request in enumerate(requests):
        engine.submit(place, request, method, SEED)
    found: dict[Any, Any] = {}
    ends, finished = [time.perf_counter()], []
    while engine.busy:
        outcomes = engine.step()
        ends.append(time.perf_counter())
        finished.append(len(outcomes))
        found.update(outcomes)
    refused = next((o.message for o in found.values() if isinstance(o, RequestError)), None)
    if refused:
        raise RuntimeError(f"the engine refused a request of the benchmark: {refused}")
    return found, Steps(tuple(ends), tuple(finished))


def to_continue(prompts: Prompts, new_tokens: int) -> list[Request]:
    """Requests for ``new_tokens`` behind every prompt; the model must know no stop tokens."""
    return [
        Request(
            task="benchmark",
            doc_id=place,
            repeat=0,
            kind=RequestKind.GENERATE,
            prompt="",
            prompt_ids=tuple(prompt),
            max_new_tokens=new_tokens,
        )
        for place, prompt in enumerate(prompts)
    ]
