"""Running a plan: answers come in, are scored and committed, and become metrics at the end."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from threading import Event, current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar

from harp_batch.cluster.actor import Recipe
from harp_batch.cluster.buffer import Buffer
from harp_batch.cluster.dispatcher import cut
from harp_batch.cluster.driver import run_model
from harp_batch.cluster.layout import Wishes
from harp_batch.cluster.loop import View
from harp_batch.errors import StoreUnavailable
from harp_batch.records import Answer, Evaluation, FinishReason, Request, Shard
from harp_batch.service.plan import Plan
from harp_batch.service.progress import Observer, Tally
from harp_batch.service.writer import OUTAGE, Writer
from harp_batch.store import Attempt, Store

T = TypeVar("T")
FLUSH = 4.0  # seconds that answers get to be committed when the run is stopped
RATE_WINDOW = 30.0  # seconds over which the rate is taken


class Recorder:
    """Scores the answers of one run, has them committed and tells the observer: the loop's watcher."""

    def __init__(self, plan: Plan, store: Store, attempt: Attempt, observer: Observer, stop: Event) -> None:
        self._plan = plan
        self._store = store
        self._observer = observer
        self._stop = stop
        self._began = time.monotonic()
        self._tally = Tally(plan.run.evaluations)
        self._view = View((), {}, 0, ())
        self._phase = ""
        self._deadline = math.inf  # for what still waits when the run is stopped
        self._rate: deque[tuple[float, int]] = deque()
        self._told: list[str] = []
        self._evaluations = {e.id: e for e in plan.run.evaluations}
        self._requests = {
            e.id: {(r.doc_id, r.repeat): r for r in plan.requests(e)} for e in plan.run.evaluations
        }
        self._writer = Writer(store, attempt, self._snapshot, self._tally.add, self._unstorable)
        self._writer.start()

    def close(self) -> None:
        """Stop writing; what is not committed by now never will be."""
        self._writer.close()

    def missing(self, evaluation: Evaluation) -> list[Request]:
        """The requests of ``evaluation`` that the store has no answer for; the others are counted."""
        self._tally.remember(self.patiently(lambda: list(self._store.answers(evaluation.id))))
        answered = self.patiently(lambda: self._store.answered(evaluation.id))
        return [r for key, r in self._requests[evaluation.id].items() if key not in answered]

    def phase(self, text: str) -> None:
        """Tell what happens now."""
        self._phase = text
        self._observer.phase(text)

    @property
    def cancelled(self) -> bool:
        """Whether someone asked for the run to be cancelled."""
        return self._writer.cancelled

    # What the loop asks and tells

    def answers(self, answers: Sequence[Answer]) -> None:
        """Score ``answers`` and have them committed."""
        self._writer.put([self._score(answer) for answer in answers])

    def has_room(self) -> bool:
        """Whether more answers may be decoded: not while too many wait for the database."""
        return self._writer.has_room

    def should_stop(self) -> bool:
        """Whether someone asked the run to end."""
        return self._stop.is_set() or self._writer.cancelled

    def tick(self, view: View) -> None:
        """Show how far the run is; raises what keeps answers from being committed."""
        self._writer.check()
        self._tell_news(view)
        self._view = view
        actors = sum(actor["state"] in ("idle", "decoding") for actor in view.actors)
        self._observer.progress(self._tally.progress(time.monotonic() - self._began, actors))

    def finish(self) -> bool:
        """Wait until every answer is committed; False where the run was stopped and some could not be."""
        self._writer.drain(self._given_up)
        self._observer.progress(self._tally.progress(time.monotonic() - self._began, 0))
        return not self._writer.waiting

    def require_reachable(self) -> None:
        """Raise StoreUnavailable where the run was stopped while the database is away; asking again takes too long."""
        if self.should_stop() and self._writer.away:
            raise StoreUnavailable(
                "the run is stopped while its database does not answer, "
                f"which lacks the last {self._writer.waiting} answers"
            )

    def patiently(self, ask: Callable[[], T]) -> T:
        """What the store answers, however long it is away.

        Raises StoreUnavailable where the run is stopped meanwhile, or after an hour.
        """
        waits = Buffer()
        while True:
            try:
                return ask()
            except StoreUnavailable:
                if self._given_up() or waits.failed(time.monotonic()) > OUTAGE:
                    raise
            while not waits.may_try(time.monotonic()) and not self._given_up():
                time.sleep(0.1)

    def _given_up(self) -> bool:
        """Whether the run was stopped, and the time for last things is over."""
        if self.should_stop():
            self._deadline = min(self._deadline, time.monotonic() + FLUSH)
        return time.monotonic() > self._deadline

    def _tell_news(self, view: View) -> None:
        for note in self._notes(view):
            if note not in self._told:
                self._observer.note(note)
        self._told = self._notes(view)

    def _notes(self, view: View) -> list[str]:
        away = ["the database does not answer; finished answers are kept until it does"]
        return [*view.notes, *(away if self._writer.away else [])]

    def _snapshot(self) -> tuple[dict[str, Any], float]:
        """What ``status`` shows to other processes, and the seconds of this attempt."""
        seconds = time.monotonic() - self._began
        progress = self._tally.progress(seconds, 0)
        state = {
            "phase": self._phase,
            "evaluations": [asdict(e) for e in progress.evaluations],
            "actors": list(self._view.actors),
            "shards": self._view.shards,
            "losses": self._view.losses,
            "rate": self._tokens_per_second(seconds, sum(e.output_tokens for e in progress.evaluations)),
            "buffered": self._writer.waiting,
            "notes": self._notes(self._view),
        }
        return state, seconds

    def _tokens_per_second(self, now: float, tokens: int) -> float | None:
        """Output tokens a second of late; None until some time has passed."""
        self._rate.append((now, tokens))
        while now - self._rate[0][0] > RATE_WINDOW:
            self._rate.popleft()
        since, before = self._rate[0]
        return (tokens - before) / (now - since) if now > since else None

    def _score(self, answer: Answer) -> Answer:
        request = self._requests[answer.evaluation_id][answer.doc_id, answer.repeat]
        task = self._plan.task(self._evaluations[answer.evaluation_id])
        try:
            scores, correct = task.score(request, answer)
        except Exception as exc:  # noqa: BLE001 - a task's own code, on any text: that sample's error
            failed = _failed(answer, f"scoring failed: {type(exc).__name__}: {exc}")
            return failed if answer.error else self._score(failed)  # a task has a value for errors, too
        return replace(answer, scores=scores, correct=correct)

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


def decode(plan: Plan, wishes: Wishes, recorder: Recorder) -> bool:
    """Answer all that lacks an answer, model by model; return False where it was stopped before the end."""
    waiting = {e.id: recorder.missing(e) for e in plan.run.evaluations}
    recorder.tick(View((), {}, 0, ()))
    for ref in plan.models:
        evaluations = [e for e in plan.run.evaluations if e.model == ref and waiting[e.id]]
        recorder.phase(f"decoding with {ref}")
        shards = list(_shards(evaluations, waiting, plan.spec.cluster.shard_size))
        hang_timeout = plan.spec.cluster.hang_timeout
        if shards and not run_model(_recipe(plan, ref), wishes, shards, recorder, hang_timeout):
            recorder.finish()
            return False
    return recorder.finish()


def _shards(
    evaluations: Sequence[Evaluation], waiting: dict[str, list[Request]], size: int
) -> Iterator[Shard]:
    number = 0
    for evaluation in evaluations:
        for shard in cut(number, evaluation.id, waiting[evaluation.id], size):
            yield shard
            number += 1


def _recipe(plan: Plan, ref: str) -> Recipe:
    return Recipe(
        model=plan.models[ref],
        dtype=next(model.dtype for model in plan.spec.models if model.ref == ref),
        methods={e.id: e.settings for e in plan.run.evaluations if e.model == ref},
        seed=plan.run.seed,
        slots=plan.spec.cluster.slots,
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
