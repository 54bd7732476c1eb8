"""What the engine answers a request with."""

from __future__ import annotations

from dataclasses import dataclass

from harp_batch.decode.sequence import Sequence
from harp_batch.records import Completion, Score


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why one request has no answer; the others go on."""

    message: str


Outcome = Completion | tuple[Score, ...] | RequestError


def outcome(sequence: Sequence) -> Outcome:
    """Of a sequence that is done."""
    return RequestError(sequence.error) if sequence.error else sequence.completion()
