"""One request's decoding state: what it wants from the next forward, and what it makes of the logits.

A `Sequence` generates; a `Scoring` reads the log-likelihood of one continuation. Both go through the same two
questions at every token: do the original logits hesitate, and if so, what do the reframed ones say?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from harp_batch.decode.harp import mask_key
from harp_batch.decode.methods import Method, Reframing
from harp_batch.decode.runner import Chunk, Mask
from harp_batch.records import Completion, FinishReason, Score, TokenTrace

PREFILL_CHUNK = 512  # positions; counted from the request's own beginning, so that neighbours cannot shift it


@dataclass(frozen=True, slots=True)
class Work:
    """One chunk of one owner; ``steps`` names the token that each of the chunk's outputs decides."""

    owner: Sequence | Scoring
    chunk: Chunk
    steps: tuple[int, ...]

    @property
    def reframed(self) -> bool:
        """Whether the outputs are the reframed logits of parked steps."""
        return self.chunk.mask is not None


@dataclass(slots=True)
class Step:
    """What is known about one token so far."""

    entropy: float
    vanilla: int
    hesitated: bool
    parked: Tensor | None = None  # original logits [V], while the reframed ones are awaited
    token: int = -1
    flipped: bool = False
    logprob: float = 0.0


@dataclass(slots=True, kw_only=True)
class Owner:
    """What `Sequence` and `Scoring` share: identity, method, steps and costs."""

    ticket: Hashable
    key: str
    seed: int
    method: Method
    arrival: int = 0
    steps: dict[int, Step] = field(default_factory=dict)
    forward_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def reframing(self) -> Reframing:
        """How the method reframes; asked only where something was parked."""
        assert self.method.reframing is not None
        return self.method.reframing

    def observe(self, step: int, entropy: float, vanilla: int, logits: Tensor) -> bool:
        """Take a step's original logits [V]; True if they settle the step, False if it is parked or failed."""
        if not math.isfinite(entropy):
            self.error = "the model's logits are not finite"
            return False
        hesitated = self.method.reframing is not None and entropy > self.method.reframing.theta
        self.steps[step] = Step(entropy, vanilla, hesitated, parked=logits if hesitated else None)
        return not hesitated

    def parked(self, step: int) -> Tensor:
        """The original logits [V] of a step that awaits its reframed ones."""
        parked = self.steps[step].parked
        assert parked is not None
        return parked

    def mask(self, step: int) -> Mask:
        """The mask of a step's reframed pass."""
        key = mask_key(self.seed, self.key, self.reframing.mask_step(step))
        return Mask(key, self.reframing.delta)

    def parked_steps(self) -> list[int]:
        """Steps that await their reframed logits, in order."""
        return sorted(s for s, state in self.steps.items() if state.parked is not None)

    def trace(self) -> TokenTrace:
        """All steps, in order."""
        states = [self.steps[s] for s in sorted(self.steps)]
        return TokenTrace(
            token_ids=tuple(s.token for s in states),
            entropy=tuple(s.entropy for s in states),
            hesitated=tuple(s.hesitated for s in states),
            vanilla_token_ids=tuple(s.vanilla for s in states),
            flipped=tuple(s.flipped for s in states),
        )


class Stopper(Protocol):
    """Says whether the generated token ids (the newest last) end the answer."""

    def __call__(self, generated: list[int]) -> bool:
        """True to stop."""
        ...


@dataclass(slots=True, kw_only=True)
class Sequence(Owner):
    """A prompt being continued."""

    tokens: list[int]  # prompt, then what was generated
    prompt_tokens: int
    max_new_tokens: int
    stop: Callable[[list[int]], bool]
    slot: int | None = None
    cached: int = 0  # positions of the original stream that are in the KV pool
    reframed_cached: int = 0  # and of the reframed one (mask: sequence)
    finish_reason: FinishReason | None = None

    @property
    def need(self) -> int:
        """Positions that it may come to occupy."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def generated(self) -> list[int]:
        """The new tokens."""
        return self.tokens[self.prompt_tokens :]

    @property
    def done(self) -> bool:
        """Nothing more is to come."""
        return self.finish_reason is not None or self.error is not None

    def work(self) -> list[Work]:
        """The next chunk: the parked step's reframed pass, or the next piece of the original stream."""
        step = len(self.tokens) - self.prompt_tokens
        if step in self.steps:
            return [Work(self, self._reframed_chunk(step), (step,))]
        end = min(self.cached + PREFILL_CHUNK, len(self.tokens))
        outputs = (end - 1 - self.cached,) if end == len(self.tokens) else ()
        chunk = Chunk(self.tokens[self.cached : end], self.cached, outputs, self.slot)
        return [Work(self, chunk, (step,) if outputs else ())]

    def _reframed_chunk(self, step: int) -> Chunk:
        mask = self.mask(step)
        if self.reframing.mask == "step":
            return Chunk(list(self.tokens), 0, (len(self.tokens) - 1,), slot=None, mask=mask)
        pending = self.tokens[self.reframed_cached :]
        return Chunk(pending, self.reframed_cached, (len(pending) - 1,), self.slot, mask)

    def ran(self, chunk: Chunk) -> None:
        """The chunk went through the model."""
        self.forward_tokens += len(chunk)
        if chunk.slot is None:
            return
        if chunk.mask is None:
            self.cached = chunk.start + len(chunk)
        else:
            self.reframed_cached = chunk.start + len(chunk)

    def settle(self, step: int, chosen: int, logprob: float) -> None:
        """The step's token is ``chosen``."""
        state = self.steps[step]
        state.parked, state.token, state.logprob = None, chosen, logprob
        state.flipped = chosen != state.vanilla
        self.tokens.append(chosen)
        if self.stop(self.generated):
            self.finish_reason = FinishReason.STOP
        elif len(self.generated) >= self.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH

    def completion(self) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None
        return Completion(
            token_ids=tuple(self.generated),
            trace=self.trace(),
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            forward_tokens=self.forward_tokens,
            seconds=self.seconds,
        )


@dataclass(slots=True, kw_only=True)
class Scoring(Owner):
    """The log-likelihood of one continuation after one context; its steps are the target positions."""

    context: tuple[int, ...]
    targets: tuple[int, ...]
    greedy: dict[int, bool] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Every target is settled."""
        return self.error is not None or len(self.greedy) == len(self.targets)

    def work(self) -> list[Work]:
        """The original pass over everything; then the reframed passes of the targets that hesitated."""
        if not self.steps:
            return [self._pass(range(len(self.targets)), None)]
        parked = self.parked_steps()
        if parked and self.reframing.mask == "sequence":
            return [self._pass(parked, self.mask(0))]
        return [self._pass([step], self.mask(step)) for step in parked]

    def _pass(self, steps: range | list[int], mask: Mask | None) -> Work:
        first = len(self.context) - 1  # the row that predicts target 0
        tokens = (self.context + self.targets)[: first + steps[-1] + 1]
        chunk = Chunk(tokens, 0, tuple(first + s for s in steps), slot=None, mask=mask)
        return Work(self, chunk, tuple(steps))

    def ran(self, chunk: Chunk) -> None:
        """The chunk went through the model."""
        self.forward_tokens += len(chunk)

    def settle(self, step: int, chosen: int, logprob: float) -> None:
        """The final logits of a target prefer ``chosen`` and give the target ``logprob``."""
        state = self.steps[step]
        state.parked, state.token, state.logprob = None, self.targets[step], logprob
        state.flipped = chosen != state.vanilla
        self.greedy[step] = chosen == self.targets[step]

    def score(self) -> Score:
        """The finished score."""
        return Score(
            logprob=math.fsum(state.logprob for state in self.steps.values()),
            is_greedy=all(self.greedy.values()),
            trace=self.trace(),
            prompt_tokens=len(self.context),
            forward_tokens=self.forward_tokens,
            seconds=self.seconds,
        )
