"""What enters the engine: requests as owners of decoding state, or the reason why the model cannot read them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from harp_batch.decode.methods import Method
from harp_batch.decode.sequence import Scoring, Sequence

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # context ids, continuation ids


class Unfit(Exception):
    """The model cannot read this request; the message says why."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whom an owner's outcome goes to, and how it is decoded."""

    ticket: Hashable
    key: str
    method: Method
    seed: int


@dataclass(frozen=True, slots=True)
class Intake:
    """Checks requests against what the model can read."""

    context: int  # positions
    vocabulary: int

    def sequence(
        self, origin: Origin, prompt: tuple[int, ...], max_new_tokens: int, stop: Callable[[list[int]], bool]
    ) -> Sequence:
        """A prompt to be continued, by no more tokens than the context has room for; raises Unfit."""
        self._require_readable(prompt, positions=len(prompt) + 1)
        if max_new_tokens < 1:
            raise Unfit(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
        return Sequence(
            ticket=origin.ticket,
            key=origin.key,
            seed=origin.seed,
            method=origin.method,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            max_new_tokens=min(max_new_tokens, self.context - len(prompt)),
            stop=stop,
        )

    def scorings(self, origin: Origin, pairs: Seq[Pair]) -> list[Scoring]:
        """Continuations to be scored, those of one context together; raises Unfit."""
        if not pairs:
            raise Unfit("the request has no continuation to score")
        for context, targets in pairs:
            self._require_readable(context, positions=len(context))
            self._require_readable(targets, positions=len(context) + len(targets) - 1)
        return [
            Scoring(
                ticket=origin.ticket,
                key=origin.key,
                seed=origin.seed,
                method=origin.method,
                context=context,
                continuations=tuple(pairs[place][1] for place in places),
                choices=tuple(places),
            )
            for context, places in _by_context(pairs).items()
        ]

    def _require_readable(self, tokens: tuple[int, ...], positions: int) -> None:
        """Raise Unfit unless the model can read ``tokens`` as part of a text of so many positions."""
        if not tokens:
            raise Unfit("the prompt or the continuation is empty")
        if positions > self.context:
            raise Unfit(f"the prompt needs {positions} positions and the model's context has {self.context}")
        strange = next((t for t in tokens if not 0 <= t < self.vocabulary), None)
        if strange is not None:
            raise Unfit(
                f"token {strange} is not one of the model's {self.vocabulary}: is the tokenizer its own?"
            )


def _by_context(pairs: Seq[Pair]) -> dict[tuple[int, ...], list[int]]:
    """Places of the pairs, by context."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (context, _) in enumerate(pairs):
        places.setdefault(context, []).append(place)
    return places
