"""The decoding engine: a step is collect what ran, retire what is done, launch what comes next."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from harp_batch.decode.batcher import Batcher, Limits
from harp_batch.decode.intake import Intake, Origin, Pair, Unfit
from harp_batch.decode.limits import context_length, is_out_of_memory, kv_positions
from harp_batch.decode.methods import Method
from harp_batch.decode.outcome import Outcome, RequestError, outcome
from harp_batch.decode.postprocess import apply, decide, original_first
from harp_batch.decode.runner import ModelRunner
from harp_batch.decode.sequence import Scoring, Sequence, Work
from harp_batch.decode.text import Stop, StopStrings, Tokenizer, stop_token_ids
from harp_batch.errors import UserError
from harp_batch.records import Completion, Request, RequestKind, Score

_STEP_ROWS = 1024
_FEWEST_ROWS = 64  # an out-of-memory error does not make forwards smaller than this


@dataclass(frozen=True, slots=True)
class _Flight:
    """A forward whose results have not been read yet; on a GPU it may still be running."""

    work: list[Work]
    logits: Tensor  # [R, V]
    table: Tensor  # [3, R]; see postprocess.decide
    seconds: float  # spent so far


def require_supported(model: Any) -> None:
    """Raise ModelError unless an `Engine` can run the model's architecture; ``model`` may be on ``meta``."""
    ModelRunner(model, slots=0, length=0).close()
    context_length(model.config)


class Engine:
    """Continuous batching over one model, for any mixture of methods and of generation and scoring.

    Args:
        model: a transformers causal language model; its attention implementation is replaced, and on the CPU its
            linear layers are packed. ``close`` gives it back as it was.
        tokenizer: needed for requests with stop strings.
        slots: how many sequences are decoded together at most.
        max_length: positions of the longest sequence; default: the model's context.

    Raises:
        ModelError: the architecture cannot run packed batches.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer | None = None, slots: int = 64, max_length: int | None = None
    ) -> None:
        if slots < 1:
            raise UserError(f"slots must be 1 or more, not {slots}")
        self.runner = ModelRunner(model, slots=0, length=0)
        limit = context_length(model.config)
        self._intake = Intake(min(max_length or limit, limit), self.runner.vocabulary)
        budget = kv_positions(self.runner.kv_bytes_per_position, self.runner.device)
        self._limits = Limits(slots, budget, _STEP_ROWS)
        self.batcher = Batcher(self._limits)
        self.steps = 0  # attempts at a forward so far: what a watchdog watches
        self._tokenizer = tokenizer
        self._stop_ids = stop_token_ids(model, tokenizer)
        self._tickets: set[Hashable] = set()
        self._ready: list[tuple[Hashable, Outcome]] = []
        self._flight: _Flight | None = None
        self._scorings: dict[Hashable, list[Scoring]] = {}  # one for each context of a request

    def close(self) -> None:
        """Give the model its own attention and linear layers back; the engine is of no more use."""
        self.runner.close()

    @property
    def busy(self) -> bool:
        """Whether a call of `step` would do anything."""
        return self.batcher.busy or bool(self._ready)

    @property
    def waiting(self) -> int:
        """Requests that are queued and not yet in the batch."""
        return len({owner.ticket for owner in self.batcher.waiting})

    # -- requests in, outcomes out ------------------------------------------------------------------------

    def submit(self, ticket: Hashable, request: Request, method: Method, seed: int) -> None:
        """Queue a request; its outcome comes back from a later `step` under ``ticket``.

        Raises:
            UserError: the ticket's last request has not come back yet.
        """
        if ticket in self._tickets:
            raise UserError(f"ticket {ticket!r} is still in the engine")
        origin = Origin(ticket, request.key, method, seed)
        if request.kind is RequestKind.LOGLIKELIHOOD:
            self._add_scoring(origin, [(c.context_ids, c.continuation_ids) for c in request.choices])
            return
        stop = Stop(self._stop_ids, self._stop_strings(request.stop))
        self._add_sequence(origin, request.prompt_ids, request.max_new_tokens, stop)

    def step(self) -> list[tuple[Hashable, Outcome]]:
        """Finish the forward that is under way, start the next, and return the requests that finished (if any).

        On a GPU the next forward is under way when this returns, and runs while the caller deals with the outcomes.
        On the CPU, where it would make them wait, it is left to the next call.
        """
        self._collect()
        self._ready += self._retire()
        if not self._ready or self.runner.device.type == "cuda":
            self._launch()
        outcomes, self._ready = self._ready, []
        self._tickets -= {ticket for ticket, _ in outcomes}
        return outcomes

    def generate(
        self,
        prompts: Seq[Seq[int]],
        *,
        method: Method,
        max_new_tokens: int,
        stop_token_ids: Seq[int] = (),
        seed: int = 0,
        request_keys: Seq[str] | None = None,
    ) -> list[Completion]:
        """Continue every prompt (token ids); the completions are in the prompts' order.

        ``request_keys`` name the prompts for masks; default: "0", "1", … A stop token ends a completion and is
        its last token.

        Raises:
            UserError: a prompt is empty or does not fit the context, keys and prompts differ in number, or
                requests of `submit` are still in the engine.
        """
        self._require_idle()
        keys = _keys(request_keys, len(prompts))
        stop = Stop(frozenset(stop_token_ids), None)

        def add() -> None:
            for i, prompt in enumerate(prompts):
                self._add_sequence(Origin(i, keys[i], method, seed), tuple(prompt), max_new_tokens, stop)

        outcomes = self._drain(add)
        return [outcomes[i] for i in range(len(prompts))]

    def loglikelihood(
        self,
        pairs: Seq[tuple[Seq[int], Seq[int]]],
        *,
        method: Method,
        seed: int = 0,
        request_keys: Seq[str] | None = None,
    ) -> list[Score]:
        """Score every (context ids, continuation ids); a score unpacks to (logprob, is_greedy, trace).

        Raises:
            UserError: as `generate`, for contexts and continuations.
        """
        self._require_idle()
        keys = _keys(request_keys, len(pairs))

        def add() -> None:
            for i, (context, continuation) in enumerate(pairs):
                self._add_scoring(Origin(i, keys[i], method, seed), [(tuple(context), tuple(continuation))])

        outcomes = self._drain(add)
        return [outcomes[i][0] for i in range(len(pairs))]

    def _require_idle(self) -> None:
        if self.busy:
            raise UserError("the engine still has requests from submit(): step() until it is not busy")

    def _drain(self, add: Callable[[], None]) -> dict[Hashable, Any]:
        """Outcomes of everything that ``add`` queues; leaves nothing behind, whatever happens."""
        outcomes: dict[Hashable, Any] = {}
        try:
            add()
            while self.busy:
                outcomes.update(self.step())
        except BaseException:
            self.batcher = Batcher(self.batcher.limits)
            self._flight = None
            self._ready.clear()
            self._scorings.clear()
            self._tickets.clear()
            self.runner.release()
            raise
        for index, found in outcomes.items():
            if isinstance(found, RequestError):
                raise UserError(f"request {index}: {found.message}")
        return outcomes

    # -- admission ----------------------------------------------------------------------------------------

    def _add_sequence(self, origin: Origin, prompt: tuple[int, ...], max_new_tokens: int, stop: Stop) -> None:
        self._tickets.add(origin.ticket)
        try:
            self.batcher.add(self._intake.sequence(origin, prompt, max_new_tokens, stop))
        except Unfit as reason:
            self._ready.append((origin.ticket, RequestError(str(reason))))

    def _add_scoring(self, origin: Origin, pairs: Seq[Pair]) -> None:
        self._tickets.add(origin.ticket)
        try:
            scorings = self._intake.scorings(origin, pairs)
        except Unfit as reason:
            self._ready.append((origin.ticket, RequestError(str(reason))))
            return
        self._scorings[origin.ticket] = scorings
        for scoring in scorings:
            self.batcher.add(scoring)

    def _stop_strings(self, strings: Seq[str]) -> StopStrings | None:
        if not strings:
            return None
        if self._tokenizer is None:
            raise UserError("stop strings need a tokenizer: pass it to Engine(model, tokenizer)")
        return StopStrings(self._tokenizer, strings)

    # -- one step -----------------------------------------------------------------------------------------

    def _launch(self) -> None:
        started = time.perf_counter()
        work: list[Work] = []
        try:
            work = self._schedule()
            if not work:
                return
            self.steps += 1
            logits = self.runner.forward([w.chunk for w in work])
            table = decide(work, logits)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._relieve(work)
            return
        self._flight = _Flight(work, logits, table, time.perf_counter() - started)

    def _collect(self) -> None:
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        started = time.perf_counter()
        apply(flight.work, flight.logits, flight.table.tolist())
        self._account(flight.work, flight.seconds + time.perf_counter() - started)

    def _schedule(self) -> list[Work]:
        self.batcher.admit()
        pool = self.runner.backend.original
        slots, length = self.batcher.slots, self.batcher.length
        if length and (slots, length) != (pool.slots, pool.length):
            kept = max((s.slot + 1 for s in self.batcher.live if s.slot is not None and s.cached), default=0)
            self.runner.resize(slots, length, kept)
        return original_first(self.batcher.work())

    def _relieve(self, work: list[Work]) -> None:
        """Make do with less after an allocation failed; the step that failed has changed nothing.

        First fewer rows go into a forward; then fewer requests are worked at together, and those that were start
        again; a request that fails by itself, with one slot and nothing else in memory, gets an error.
        """
        limits = self.batcher.limits
        rows = sum(len(w.chunk) for w in work)
        if len(work) > 1 and rows > _FEWEST_ROWS < limits.step_rows:
            self.batcher.limits = replace(
                limits, step_rows=max(min(rows, limits.step_rows) // 2, _FEWEST_ROWS)
            )
            return
        live = self.batcher.live
        owners: list[Sequence | Scoring] = [*live, *self.batcher.scoring]
        idle_pool = not live and self.runner.backend.original.slots > 0
        slots = min(limits.slots, max(len(owners), self.batcher.slots if live else 1))
        self.batcher.evict()
        self.runner.release()
        if slots > 1 or idle_pool:
            self.batcher.limits = replace(limits, slots=max(slots // 2, 1))
        else:
            self._give_up(owners[0])

    def _give_up(self, owner: Sequence | Scoring) -> None:
        """Drop a request that memory has no room for; the others get theirs back."""
        self.batcher.drop(owner.ticket)
        self._scorings.pop(owner.ticket, None)
        self._ready.append((owner.ticket, RequestError("there is not enough memory for this request")))
        self.batcher.limits = self._limits

    def _account(self, work: list[Work], seconds: float) -> None:
        """Share the step's time out by rows."""
        rows = sum(len(w.chunk) for w in work)
        for w in work:
            w.owner.seconds += seconds * len(w.chunk) / rows

    def _retire(self) -> list[tuple[Hashable, Outcome]]:
        outcomes: list[tuple[Hashable, Outcome]] = []
        for sequence in [s for s in self.batcher.live if s.done]:
            outcomes.append((sequence.ticket, outcome(sequence)))
            if sequence.error and sequence.slot is not None:
                self.runner.clear(sequence.slot)
        for ticket in {s.ticket: None for s in self.batcher.scoring if s.done}:
            scorings = self._scorings[ticket]
            failed = next((s.error for s in scorings if s.error), None)
            if failed:
                self.batcher.drop(ticket)
                outcomes.append((ticket, RequestError(failed)))
            elif all(s.done for s in scorings):
                scores = {place: score for s in scorings for place, score in s.scores().items()}
                outcomes.append((ticket, tuple(scores[place] for place in sorted(scores))))
            else:
                continue
            del self._scorings[ticket]
        for move in self.batcher.retire():
            self.runner.move(move.source, move.target, move.length)
        return outcomes


def _keys(given: Seq[str] | None, count: int) -> Seq[str]:
    keys = [str(i) for i in range(count)] if given is None else given
    if len(keys) != count:
        raise UserError(f"there are {len(keys)} request_keys for {count} requests; give one for each")
    return keys
