"""A worker process around one engine: takes leases, decodes, hands finished answers over in lists.

The decoding thread owns the engine. Calls from outside touch an inbox and an outbox only, so that ``poll``
answers at once however long a step takes. driver.py makes ``Worker`` a Ray actor; nothing here needs Ray.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harp_batch.cluster.dispatcher import Lease, LeaseId
from harp_batch.decode import Engine, Outcome, method_from_settings
from harp_batch.decode.process import prepare_process
from harp_batch.decode.text import answer_text
from harp_batch.errors import HarpBatchError, ModelError
from harp_batch.models import LocalModel, load_model, load_tokenizer, resolve
from harp_batch.place import here
from harp_batch.records import Answer, Completion, FinishReason, Request, Score, TokenTrace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a worker needs to know to answer any request of one model."""

    model: LocalModel
    dtype: str
    methods: Mapping[str, dict[str, Any]]  # evaluation id -> the method's settings
    seed: int
    slots: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What happened since the last poll, and how the worker is."""

    answers: tuple[tuple[LeaseId, Answer], ...]
    ready: bool  # the model is loaded
    steps: int  # engine steps so far; they must go on while it owes answers
    waiting: int  # requests that have no slot yet
    forward_tokens: int  # of all finished answers so far
    place: str  # see `place.here`
    pid: int
    error: str | None = None  # the worker is of no more use; what broke it


@dataclass(frozen=True, slots=True, eq=False)  # hashed by identity
class _Ticket:
    lease: LeaseId
    evaluation_id: str
    request: Request


class Worker:
    """Decodes leases until it is stopped or broken."""

    def __init__(self, recipe: Recipe, device: str = "cpu", threads: int = 1) -> None:
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # num_gpus=0 alone does not hide them
        self._recipe = recipe
        self._device = device
        self._threads = threads
        self._inbox: queue.SimpleQueue[Lease | None] = queue.SimpleQueue()  # None: wake up and look
        self._outbox: list[tuple[LeaseId, Answer]] = []
        self._news = threading.Condition()
        self._stopping = False
        self._ready = False
        self._steps = 0
        self._waiting = 0
        self._forward_tokens = 0
        self._error: str | None = None
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    def assign(self, lease: Lease) -> None:
        """Queue the requests of ``lease`` behind what is already here."""
        self._inbox.put(lease)

    def poll(self, patience: float = 0.0) -> Reply:
        """Hand over what has finished; wait up to ``patience`` seconds where nothing has."""
        with self._news:
            self._news.wait_for(lambda: self._outbox or self._error, timeout=patience)
            answers, self._outbox = tuple(self._outbox), []
            return Reply(
                answers=answers,
                ready=self._ready,
                steps=self._steps,
                waiting=self._waiting,
                forward_tokens=self._forward_tokens,
                place=here(),
                pid=os.getpid(),
                error=self._error,
            )

    def stop(self) -> None:
        """End the decoding thread after its current step."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._decode()
        except Exception as exc:  # whatever broke the engine must reach the driver
            log.exception("the worker broke")
            with self._news:
                self._error = str(exc) if isinstance(exc, HarpBatchError) else f"{type(exc).__name__}: {exc}"
                self._news.notify_all()

    def _decode(self) -> None:
        recipe = self._recipe
        prepare_process(self._threads)
        local = _on_this_machine(recipe.model)
        tokenizer = load_tokenizer(local)
        model = load_model(local, dtype=recipe.dtype, device=self._device)
        engine = Engine(model, tokenizer=tokenizer, slots=recipe.slots)
        methods = {name: method_from_settings(settings) for name, settings in recipe.methods.items()}
        self._ready = True
        while not self._stopping:
            for lease in self._arrivals(block=not engine.busy):
                for request in lease.requests:
                    ticket = _Ticket(lease.id, lease.evaluation_id, request)
                    engine.submit(ticket, request, methods[lease.evaluation_id], recipe.seed)
            self._deliver(engine, engine.step(), tokenizer)

    def _arrivals(self, block: bool) -> list[Lease]:
        """Everything in the inbox; waits for something where there is nothing else to do."""
        arrived = [self._inbox.get()] if block else []
        while not self._inbox.empty():
            arrived.append(self._inbox.get())
        return [lease for lease in arrived if lease is not None]

    def _deliver(self, engine: Engine, finished: list[tuple[Any, Outcome]], tokenizer: Any) -> None:
        answers = [
            (ticket.lease, to_answer(ticket.evaluation_id, ticket.request, outcome, tokenizer))
            for ticket, outcome in finished
        ]
        with self._news:
            self._steps, self._waiting = engine.steps, engine.waiting
            self._forward_tokens += sum(answer.forward_tokens for _, answer in answers)
            self._outbox += answers
            if answers:
                self._news.notify_all()


def to_answer(evaluation_id: str, request: Request, outcome: Outcome, tokenizer: Any) -> Answer:
    """What the engine found for ``request``, as the answer to be committed (not scored yet)."""
    if isinstance(outcome, Completion):
        return _generated(evaluation_id, request, outcome, tokenizer)
    if isinstance(outcome, tuple):
        return _scored(evaluation_id, request, outcome)
    return error_answer(evaluation_id, request, outcome.message)


def error_answer(evaluation_id: str, request: Request, message: str) -> Answer:
    """The answer of a request that could not be answered."""
    return Answer(evaluation_id, request.doc_id, request.repeat, FinishReason.ERROR, error=message)


def _generated(evaluation_id: str, request: Request, completion: Completion, tokenizer: Any) -> Answer:
    return Answer(
        evaluation_id,
        request.doc_id,
        request.repeat,
        completion.finish_reason,
        text=answer_text(tokenizer, completion.token_ids, request.stop),
        trace=completion.trace,
        prompt_tokens=completion.prompt_tokens,
        forward_tokens=completion.forward_tokens,
        seconds=completion.seconds,
    )


def _scored(evaluation_id: str, request: Request, scores: tuple[Score, ...]) -> Answer:
    return Answer(
        evaluation_id,
        request.doc_id,
        request.repeat,
        FinishReason.SCORED,
        choices=tuple((score.logprob, score.is_greedy) for score in scores),
        trace=sum((score.trace for score in scores), TokenTrace()),
        prompt_tokens=max(score.prompt_tokens for score in scores),  # choices share one context
        forward_tokens=sum(score.forward_tokens for score in scores),
        seconds=sum(score.seconds for score in scores),
    )


def _on_this_machine(model: LocalModel) -> LocalModel:
    """The model's files here: the driver's own path where it is shared, else fetched anew."""
    if Path(model.path).exists():
        return model
    local = resolve(model.ref, model.revision)
    if local.weights_sha256 != model.weights_sha256:
        raise ModelError(f"{model.ref} has other weights on this machine than where the run was submitted")
    return local
