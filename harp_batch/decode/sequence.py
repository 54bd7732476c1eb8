"""One request's decoding state: what it wants from the next forward, and what it makes of the logits.

A `Sequence` generates; a `Scoring` reads the log-likelihoods of continuations. Both go through the same two
questions at every token: do the original logits hesitate, and if so, what do the reframed ones say?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from harp_batch.decode.chunk import Chunk, Mask
from harp_batch.decode.harp import mask_key
from harp_batch.decode.methods import Method, Reframing
from harp_batch.records import Completion, FinishReason, Score, TokenTrace

PREFILL_CHUNK = 512  # positions; counted from the request's own beginning, so that neighbours cannot shift it
SHORT_CHUNK = 16  # rows; chunks of no more always go along, so that nobody waits for his next token
_OFTEN = 3  # a sequence that has hesitated at every third token so far is expected to do so again


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
    hesitations: int = 0
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
        if not self.require_finite(entropy):
            return False
        hesitated = self.method.reframing is not None and entropy > self.method.reframing.theta
        self.steps[step] = Step(entropy, vanilla, hesitated, parked=logits if hesitated else None)
        self.hesitations += hesitated
        return not hesitated

    def awaits(self, step: int) -> bool:
        """Whether the step is parked for its reframed logits."""
        return step in self.steps and self.steps[step].parked is not None

    def require_finite(self, value: float) -> bool:
        """Fail where ``value``, which was computed from a row of logits, says that not all of them are finite."""
        finite = math.isfinite(value)
        if not finite:
            self.error = "the model's logits are not finite"
        return finite

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

    def restart(self) -> None:
        """Forget all progress, for the keys and values are gone; the time that it took stays on the bill."""
        self.steps.clear()
        self.hesitations = self.forward_tokens = 0


@dataclass(slots=True, kw_only=True)
class Sequence(Owner):
    """A prompt being continued."""

    tokens: list[int]  # prompt, then what was generated
    prompt_tokens: int
    max_new_tokens: int
    stop: Callable[[list[int]], bool]  # whether the new tokens, the newest last, end the answer
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
        """The next chunk: the parked step's reframed pass, or the next piece of the original stream.

        A sequence that hesitates often does not wait to be parked: its reframed stream goes along with the original.
        """
        step = len(self.tokens) - self.prompt_tokens
        if step in self.steps:
            return [Work(self, self._reframed_chunk(step), (step,))]
        end = min(self.cached + PREFILL_CHUNK, len(self.tokens))
        outputs = (end - 1 - self.cached,) if end == len(self.tokens) else ()
        chunk = Chunk(self.tokens[self.cached : end], self.cached, outputs, self.slot)
        work = [Work(self, chunk, (step,) if outputs else ())]
        if self._expects_hesitation():
            work.append(Work(self, self._reframed_chunk(step), (step,)))
        return work

    def _expects_hesitation(self) -> bool:
        """Whether the reframed stream should go along; a matter of this sequence's own past alone."""
        if self.method.reframing is None or self.method.reframing.mask == "step" or not self.steps:
            return False
        return (
            _OFTEN * self.hesitations >= len(self.steps)
            and len(self.tokens) - self.reframed_cached <= SHORT_CHUNK
        )

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

    def restart(self) -> None:
        """See `Owner.restart`."""
        Owner.restart(self)
        del self.tokens[self.prompt_tokens :]
        self.slot, self.cached, self.reframed_cached = None, 0, 0

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
            trace=_trace([self.steps[s] for s in sorted(self.steps)]),
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            forward_tokens=self.forward_tokens,
            seconds=self.seconds,
        )


@dataclass(slots=True, kw_only=True)
class Scoring(Owner):
    """The log-likelihoods of several continuations of one context; its steps are all their tokens in order.

    One pass covers everything that shares a mask: the context once, and behind it each continuation as a branch
    that does not see the others. The first token of every continuation is read from the context's last row.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    choices: tuple[int, ...] = (0,)  # the place of each continuation in its request
    targets: list[int] = field(init=False)  # by step
    places: list[tuple[int, int]] = field(init=False)  # by step: which continuation, which of its tokens
    greedy: dict[int, bool] = field(default_factory=dict)  # by step

    def __post_init__(self) -> None:
        self.targets = [token for tokens in self.continuations for token in tokens]
        self.places = [(c, j) for c, tokens in enumerate(self.continuations) for j in range(len(tokens))]

    @property
    def done(self) -> bool:
        """Every target is settled."""
        return self.error is not None or len(self.greedy) == len(self.targets)

    def work(self) -> list[Work]:
        """The original pass over everything; then a reframed pass for each mask that some target awaits."""
        if not self.steps:
            return [self._pass(list(range(len(self.targets))), None)]
        awaited: dict[int, list[int]] = {}
        for step in self.parked_steps():
            awaited.setdefault(self.reframing.mask_step(self.places[step][1]), []).append(step)
        return [self._pass(steps, self.mask(mask_step)) for mask_step, steps in awaited.items()]

    def _pass(self, steps: list[int], mask: Mask | None) -> Work:
        """One pass that gives the logits of ``steps``, with as much of each continuation as they need."""
        fed: dict[int, int] = {}  # tokens of each continuation that go through the model
        for continuation, token in (self.places[step] for step in steps):
            fed[continuation] = max(fed.get(continuation, 0), token)
        tokens, last_row = list(self.context), len(self.context) - 1
        begins = {}
        for continuation, count in fed.items():
            begins[continuation] = len(tokens)
            tokens += self.continuations[continuation][:count]
        outputs = [begins[c] + j - 1 if j else last_row for c, j in (self.places[step] for step in steps)]
        branches = tuple(count for count in fed.values() if count)
        chunk = Chunk(tokens, 0, outputs, mask=mask, branches=branches if len(branches) > 1 else ())
        return Work(self, chunk, tuple(steps))

    def ran(self, chunk: Chunk) -> None:
        """The chunk went through the model."""
        self.forward_tokens += len(chunk)

    def restart(self) -> None:
        """See `Owner.restart`."""
        Owner.restart(self)
        self.greedy.clear()

    def settle(self, step: int, chosen: int, logprob: float) -> None:
        """The final logits of a target prefer ``chosen`` and give the target ``logprob``."""
        state = self.steps[step]
        state.parked, state.token, state.logprob = None, self.targets[step], logprob
        state.flipped = chosen != state.vanilla
        self.greedy[step] = chosen == self.targets[step]

    def scores(self) -> dict[int, Score]:
        """The finished scores, by place in the request; the first one carries what all of them cost."""
        return {place: self._score(c) for c, place in enumerate(self.choices)}

    def _score(self, continuation: int) -> Score:
        steps = [s for s, (c, _) in enumerate(self.places) if c == continuation]
        return Score(
            logprob=math.fsum(self.steps[s].logprob for s in steps),
            is_greedy=all(self.greedy[s] for s in steps),
            trace=_trace([self.steps[s] for s in steps]),
            prompt_tokens=len(self.context),
            forward_tokens=0 if continuation else self.forward_tokens,
            seconds=0.0 if continuation else self.seconds,
        )


def _trace(states: list[Step]) -> TokenTrace:
    return TokenTrace(
        token_ids=tuple(s.token for s in states),
        entropy=tuple(s.entropy for s in states),
        hesitated=tuple(s.hesitated for s in states),
        vanilla_token_ids=tuple(s.vanilla for s in states),
        flipped=tuple(s.flipped for s in states),
    )
