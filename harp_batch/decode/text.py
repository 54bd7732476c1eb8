"""Between token ids and text: stop strings, and the answer's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that decoding needs."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Token ids to text."""
        ...


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


def answer_text(tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """The text of an answer: special tokens left out, cut before the first stop string."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    cuts = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    return text[: min(cuts)] if cuts else text
