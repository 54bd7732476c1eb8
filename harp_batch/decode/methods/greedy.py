"""Greedy decoding: the arg max of the model's logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harp_batch.decode import sampling


@dataclass(frozen=True, slots=True)
class Greedy:
    """Vanilla decoding: what HARP is compared with."""

    @property
    def reframing(self) -> None:
        """Greedy decoding records hesitation and does nothing about it."""
        return

    def choose(self, logits: Tensor) -> Tensor:
        """[B, V] -> int64 [B]."""
        return sampling.argmax(logits)
