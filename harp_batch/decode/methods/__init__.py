"""Decoding methods: each says how a step's logits become tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harp_batch.decode.methods.base import MASKS, Method, Reframing
from harp_batch.decode.methods.greedy import Greedy
from harp_batch.decode.methods.harp import Harp
from harp_batch.errors import JobError

KINDS: dict[str, type[Greedy] | type[Harp]] = {"greedy": Greedy, "harp": Harp}

__all__ = ["KINDS", "MASKS", "Greedy", "Harp", "Method", "Reframing", "method_from_settings"]


def method_from_settings(settings: Mapping[str, Any]) -> Method:
    """The method that a job file's settings (``kind`` and parameters) describe.

    Raises:
        JobError: the kind is unknown or a parameter is.
    """
    parameters = dict(settings)
    kind = str(parameters.pop("kind", ""))
    if kind not in KINDS:
        raise JobError(f"method {kind!r} is not available in this version; available: {', '.join(KINDS)}")
    try:
        return KINDS[kind](**parameters)
    except (TypeError, ValueError) as error:
        raise JobError(f"method {kind!r}: {error}") from error
