"""Frozen records that cross folders.

They hold plain Python values only (no tensors, no database rows), so that they can be pickled to an actor,
compared in a test and stored anywhere. Data flows one way through them:

    Request -> Shard -> Completion | Score -> Answer -> MetricValue
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class RequestKind(StrEnum):
    """What the model is asked to do (lm-eval's words)."""

    GENERATE = "generate_until"
    LOGLIKELIHOOD = "loglikelihood"


class RunStatus(StrEnum):
    """Life of a run: ``running`` ends in one of the others; ``interrupted`` and ``failed`` can be resumed."""

    RUNNING = "running"
    DONE = "done"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    CANCELLED = "cancelled"


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_new_tokens were generated
    SCORED = "scored"  # a log-likelihood request: nothing was generated
    ERROR = "error"  # this answer has an error and no text


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation to be scored after one context."""

    context_ids: tuple[int, ...]
    continuation: str
    continuation_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One document, asked once: the unit of sharding, of an answer and of a mask key."""

    task: str
    doc_id: int
    repeat: int  # 0-based; more than one only where a method samples several answers
    kind: RequestKind
    prompt: str  # what the model reads, special tokens of the chat template included
    prompt_ids: tuple[int, ...]  # empty for log-likelihood requests: see choices
    choices: tuple[Choice, ...] = ()  # empty for generation
    stop: tuple[str, ...] = ()  # generation ends before the first of these strings
    max_new_tokens: int = 0
    target: str = ""  # the right answer, for people; scoring uses doc
    doc: dict[str, Any] = field(default_factory=dict)  # the task's document, as JSON values

    @property
    def key(self) -> str:
        """What masks and samples are derived from: never the run, the shard or the worker."""
        return f"{self.task}/{self.doc_id}/{self.repeat}"

    @property
    def prompt_sha256(self) -> str:
        """Hash of everything the model reads: equal hashes mean comparable answers."""
        choices = [f"{c.context_ids} {c.continuation}" for c in self.choices]
        return hashlib.sha256("\x00".join([self.prompt, *choices]).encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """What happened at every generated (or scored) token; parallel tuples of one length."""

    token_ids: tuple[int, ...] = ()
    entropy: tuple[float, ...] = ()  # bits, of the original logits, rounded to float32
    hesitated: tuple[bool, ...] = ()
    vanilla_token_ids: tuple[int, ...] = ()  # what the original logits alone would have given
    # Whether reframing changed the arg max (generation: the token). A stored array, not derived: a scored
    # token is the task's, so it says nothing about what the combined logits preferred.
    flipped: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    def __add__(self, other: TokenTrace) -> TokenTrace:
        return TokenTrace(
            self.token_ids + other.token_ids,
            self.entropy + other.entropy,
            self.hesitated + other.hesitated,
            self.vanilla_token_ids + other.vanilla_token_ids,
            self.flipped + other.flipped,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine generated for one prompt."""

    token_ids: tuple[int, ...]
    trace: TokenTrace
    finish_reason: FinishReason
    prompt_tokens: int
    forward_tokens: int  # token positions pushed through the model for this answer, of every kind
    seconds: float  # share of the engine's busy time


@dataclass(frozen=True, slots=True)
class Score:
    """What the engine found for one (context, continuation) pair."""

    logprob: float  # nats, summed over the continuation
    is_greedy: bool  # every continuation token is the arg max of its (combined) logits
    trace: TokenTrace
    prompt_tokens: int
    forward_tokens: int  # where choices share a context, the first one carries what all of them cost
    seconds: float  # likewise

    def __iter__(self) -> Iterator[Any]:
        """Unpack as lm-eval's users expect: ``logprob, is_greedy, trace = score``."""
        return iter((self.logprob, self.is_greedy, self.trace))


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished request of one evaluation, as it is committed: answer and trace are one row."""

    evaluation_id: str
    doc_id: int
    repeat: int
    finish_reason: FinishReason
    text: str | None = None
    choices: tuple[tuple[float, bool], ...] = ()  # (logprob, is_greedy) per choice
    trace: TokenTrace = TokenTrace()
    prompt_tokens: int = 0
    forward_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    scores: dict[str, Any] = field(default_factory=dict)  # "metric,filter" -> the document's value
    correct: bool | None = None  # the task's first yes-or-no metric; None where it has none


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model on one task with one method: what a row of ``results`` speaks of."""

    id: str
    run_id: str
    model: str  # the reference as the job file has it
    task: str
    method: str  # the method's name in the job file
    settings: dict[str, Any]  # kind and parameters of the method
    is_baseline: bool
    requests: int  # how many answers make it complete


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive requests of one evaluation, handed to one actor at a time."""

    id: int  # position in the run's queue
    evaluation_id: str
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One metric of one evaluation; ``None`` means undefined, never zero."""

    evaluation_id: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    baseline: str | None = None  # name of the baseline method
    delta: float | None = None  # value minus the baseline's, paired by document
    delta_ci_low: float | None = None
    delta_ci_high: float | None = None
    p_value: float | None = None
