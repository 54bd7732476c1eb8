"""Taking a model over for packed forwards, and giving it back as it was."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from harp_batch.decode import linear
from harp_batch.decode.attention import IMPLEMENTATION

_before: WeakKeyDictionary[Any, tuple[str, bool]] = WeakKeyDictionary()  # model -> attention, training mode


def adopt(model: Any) -> bool:
    """Give the model packed attention and packed linear layers; False where it has them already."""
    if model in _before:
        return False
    _before[model] = (model.config._attn_implementation, model.training)
    model.eval()
    linear.pack(model)
    model.set_attn_implementation(IMPLEMENTATION)
    return True


def adopted(model: Any) -> bool:
    """Whether the model is in the engine's hands."""
    return model in _before


def give_back(model: Any) -> None:
    """Undo `adopt`; a model that was not adopted stays as it is."""
    if model in _before:
        implementation, training = _before.pop(model)
        linear.unpack(model)
        model.set_attn_implementation(implementation)
        model.train(training)
