"""Between token ids and text: stop strings, and the answer's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that decoding needs."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Token ids to text."""
        ...


@dataclass(frozen=True, slots=True)
class Stop:
    """End-of-sequence tokens and stop strings in one question."""

    token_ids: frozenset[int]
    strings: StopStrings | None

    def __call__(self, generated: list[int]) -> bool:
        """Whether the newest token ends the answer."""
        if generated[-1] in self.token_ids:
            return True
        return self.strings is not None and self.strings(generated)


class StopStrings:
    """Says whether the newest token completed one of the stop strings."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = [s for s in strings if s]
        # A byte-level token holds at least one byte, so this many tokens reach back over the longest string;
        # the margin covers decoders that treat the first tokens of a text in a special way.
        self._reach = max((len(s.encode()) for s in self._strings), default=0) + 4

    def __call__(self, generated: Sequence[int]) -> bool:
        """Whether the text of ``generated`` holds a stop string near its end."""
        if not self._strings:
            return False
        tail = self._tokenizer.decode(generated[-self._reach :])
        return any(s in tail for s in self._strings)


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence ids of the model's generation config, its config and the tokenizer."""
    sources = (getattr(model, "generation_config", None), model.config, tokenizer)
    found = [getattr(source, "eos_token_id", None) for source in sources]
    return frozenset(i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None)


def answer_text(tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """The text of an answer: special tokens left out, cut before the first stop string."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    cuts = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    return text[: min(cuts)] if cuts else text
