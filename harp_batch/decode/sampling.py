"""How logits become token ids: [B, V] -> [B]."""

from __future__ import annotations

from torch import Tensor


def argmax(logits: Tensor) -> Tensor:
    """The most likely token: [B, V] -> int64 [B]."""
    return logits.argmax(dim=-1)
