"""Running a plan: answers come in, are scored and committed, and become metrics at the end."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, current_thread, main_thread
from types import FrameType

from harp_batch.cluster.actor import Recipe
from harp_batch.cluster.dispatcher import cut
from harp_batch.cluster.driver import run_model
from harp_batch.cluster.layout import Layout
from harp_batch.records import Answer, Evaluation, FinishReason, Request, Shard
from harp_batch.service.plan import Plan
from harp_batch.service.progress import Observer, Tally
from harp_batch.store import Store


class Recorder:
    """Scores and commits the answers of one run, and tells the observer: the driver's watcher."""

    def __init__(self, plan: Plan, store: Store, observer: Observer, stop: Event) -> None:
        self._plan = plan
        self._store = store
        self._observer = observer
        self._stop = stop
        self._began = time.monotonic()
        self._tally = Tally(plan.run.evaluations)
        self._evaluations = {e.id: e for e in plan.run.evaluations}
        self._requests = {
            e.id: {(r.doc_id, r.repeat): r for r in plan.requests(e)} for e in plan.run.evaluations
        }

    def missing(self, evaluation: Evaluation) -> list[Request]:
        """The requests of ``evaluation`` that the store has no answer for; the others are counted."""
        self._tally.remember(self._store.answers(evaluation.id))
        answered = self._store.answered(evaluation.id)
        return [r for key, r in self._requests[evaluation.id].items() if key not in answered]

    def answers(self, answers: Sequence[Answer]) -> None:
        """Score and commit ``answers``."""
        self._tally.add(self._commit([self._score(answer) for answer in answers]))

    def tick(self, pids: Sequence[int]) -> None:
        """Show how far the run is."""
        self._observer.progress(self._tally.progress(time.monotonic() - self._began, len(pids)))

    def should_stop(self) -> bool:
        """Whether someone asked the run to end."""
        return self._stop.is_set()

    def _score(self, answer: Answer) -> Answer:
        request = self._requests[answer.evaluation_id][answer.doc_id, answer.repeat]
        task = self._plan.task(self._evaluations[answer.evaluation_id])
        try:
            scores, correct = task.score(request, answer)
        except Exception as exc:  # noqa: BLE001 - a task's own code, on any text: that sample's error
            failed = _failed(answer, f"scoring failed: {type(exc).__name__}: {exc}")
            return failed if answer.error else self._score(failed)  # a task has a value for errors, too
        return replace(answer, scores=scores, correct=correct)

    def _commit(self, answers: list[Answer]) -> list[Answer]:
        """Commit ``answers``; one with values that no database can hold becomes that sample's error."""
        try:
            self._store.commit(answers)
        except ValueError as exc:
            if len(answers) > 1:
                return [done for answer in answers for done in self._commit([answer])]
            answers = [self._unstorable(answers[0], exc)]
            self._store.commit(answers)
        return answers

    def _unstorable(self, answer: Answer, reason: ValueError) -> Answer:
        return self._score(_failed(answer, f"the answer cannot be stored: {reason}"))


def _failed(answer: Answer, message: str) -> Answer:
    """``answer`` as an error, without the values that may have caused it."""
    return Answer(
        answer.evaluation_id,
        answer.doc_id,
        answer.repeat,
        FinishReason.ERROR,
        prompt_tokens=answer.prompt_tokens,
        forward_tokens=answer.forward_tokens,
        seconds=answer.seconds if math.isfinite(answer.seconds) else 0.0,
        error=message,
    )


def decode(plan: Plan, layout: Layout, recorder: Recorder, observer: Observer) -> bool:
    """Answer all that lacks an answer, model by model; return False where it was stopped before the end."""
    waiting = {e.id: recorder.missing(e) for e in plan.run.evaluations}
    recorder.tick(())
    for ref in plan.models:
        evaluations = [e for e in plan.run.evaluations if e.model == ref and waiting[e.id]]
        observer.phase(f"decoding with {ref}")
        shards = list(_shards(evaluations, waiting, plan.spec.cluster.shard_size))
        if shards and not run_model(_recipe(plan, ref, layout), layout, shards, recorder):
            return False
    recorder.tick(())
    return True


def _shards(
    evaluations: Sequence[Evaluation], waiting: dict[str, list[Request]], size: int
) -> Iterator[Shard]:
    number = 0
    for evaluation in evaluations:
        for shard in cut(number, evaluation.id, waiting[evaluation.id], size):
            yield shard
            number += 1


def _recipe(plan: Plan, ref: str, layout: Layout) -> Recipe:
    return Recipe(
        model=plan.models[ref],
        dtype=next(model.dtype for model in plan.spec.models if model.ref == ref),
        methods={e.id: e.settings for e in plan.run.evaluations if e.model == ref},
        seed=plan.run.seed,
        slots=plan.spec.cluster.slots,
        device=layout.device,
        threads=layout.threads,
    )


@contextmanager
def stop_signals() -> Iterator[Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; a second one interrupts at once."""
    stop = Event()
    if current_thread() is not main_thread():  # Python lets only the main thread handle signals
        yield stop
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
