"""What goes through the model in one step: consecutive positions of one stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mask:
    """How a chunk's embeddings are reframed."""

    key: int  # see harp.mask_key
    delta: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive token positions of one stream, to go through the model in one step.

    It may end in several branches: alternative continuations of the same stem, which do not see each other.
    """

    token_ids: Sequence[int]  # the stem, then every branch
    start: int  # position of the first token
    outputs: Sequence[int] = ()  # offsets into token_ids whose logits are wanted, any order, repeats allowed
    slot: int | None = None  # where the stream's keys and values live; None: they are not kept
    mask: Mask | None = None  # None: the original stream; else the reframed one
    branches: Sequence[int] = ()  # length of each branch; a chunk with branches keeps nothing

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """The position behind the stem's last token."""
        return self.start + self.stem

    @property
    def stem(self) -> int:
        """Tokens before the first branch."""
        return len(self.token_ids) - sum(self.branches)

    def positions(self) -> list[int]:
        """The position of every token; each branch goes on where the stem ends."""
        branched = [p for length in self.branches for p in range(self.end, self.end + length)]
        return [*range(self.start, self.end), *branched]
