"""HARP: reframe the hesitating steps (arXiv 2412.07282, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from harp_batch.decode import sampling
from harp_batch.decode.methods.base import MASKS, MaskKind, Reframing


@dataclass(frozen=True, slots=True)
class Harp:
    """HARP on top of greedy decoding, at the paper's defaults."""

    theta: float = 1.0  # bits
    delta: float = 0.2
    beta: float = 0.5
    mask: MaskKind = "step"
    reframing: Reframing = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.theta >= 0:
            raise ValueError(f"theta is an entropy in bits and must be 0 or more, not {self.theta}")
        for name in ("delta", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, not {self.mask!r}")
        object.__setattr__(self, "reframing", Reframing(self.theta, self.delta, self.beta, self.mask))

    def choose(self, logits: Tensor) -> Tensor:
        """Combined logits [B, V] -> int64 [B]."""
        return sampling.argmax(logits)
