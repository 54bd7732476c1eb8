"""The decoding engine: HARP and its rivals over one transformers model. Needs torch and transformers alone."""

from harp_batch.decode.engine import Engine, require_supported
from harp_batch.decode.methods import Greedy, Harp, Method, method_from_settings
from harp_batch.decode.outcome import Outcome, RequestError

__all__ = [
    "Engine",
    "Greedy",
    "Harp",
    "Method",
    "Outcome",
    "RequestError",
    "method_from_settings",
    "require_supported",
]
