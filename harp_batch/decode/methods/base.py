"""What the engine asks of a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

MaskKind = Literal["step", "sequence"]
MASKS: tuple[str, ...] = get_args(MaskKind)


@dataclass(frozen=True, slots=True)
class Reframing:
    """When and how a hesitating step is reframed (the paper's θ, δ, β, and the kind of mask)."""

    theta: float  # bits; the model hesitates when H > theta
    delta: float  # probability of dropping an embedding element
    beta: float  # weight of the original logits
    mask: MaskKind

    def mask_step(self, step: int) -> int:
        """The step that enters the mask's key: a new mask at every step, or one per sequence."""
        return step if self.mask == "step" else 0


class Method(Protocol):
    """One way to decode. A method is immutable and shared by all sequences that use it."""

    @property
    def reframing(self) -> Reframing | None:
        """How hesitation is dealt with; None if it is only recorded."""
        ...

    def choose(self, logits: Tensor) -> Tensor:
        """Final logits (after any combination) to token ids: [B, V] -> int64 [B]."""
        ...
