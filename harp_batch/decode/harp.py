"""HARP as pure tensor functions: hesitation, mask, reframing, combination (arXiv 2412.07282, section 3).

Masks come from SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) used as a counter-based generator: position p of a
stream has its own 64-bit row key, and channel c is the c-th output of the generator seeded with that key.
Everything is integer arithmetic modulo 2**64, so a mask bit is the same on any device, in any batch and in any
process, and no global random state is touched.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_NEGLIGIBLE = -200.0  # nats below the largest logit; exp of it is 0 in float32
_DRAW_BITS = 53  # a draw is an integer in [0, 2**53): finer than any delta a float64 can express near 1


def _signed(value: int) -> int:
    """The int64 that has the same bits as an unsigned 64-bit value."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function, elementwise on int64."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def mask_key(seed: int, request_key: str, step: int) -> int:
    """The 64-bit key (as a signed integer) that all mask bits of one (seed, request, step) derive from."""
    name = f"{seed}\x1f{request_key}\x1f{step}".encode()
    return _signed(
        int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"harp-mask").digest(), "little")
    )


def keep_mask(keys: Tensor, positions: Tensor, hidden: int, delta: Tensor) -> Tensor:
    """Bernoulli(1 - delta) bits for any mixture of streams: keys, positions, delta [N] -> bool [N, hidden].

    ``keys`` and ``positions`` are int64, ``delta`` is float64. True means that the element is kept.
    """
    row_keys = _mix(keys + (positions + 1) * _GAMMA)  # [N]
    channels = torch.arange(1, hidden + 1, dtype=torch.int64, device=keys.device) * _GAMMA  # [hidden]
    draws = _shift_right(_mix(row_keys[:, None] + channels[None, :]), 64 - _DRAW_BITS)  # [N, hidden]
    threshold = (delta * (1 << _DRAW_BITS)).to(torch.int64)  # exact: a power of two times a float64
    return draws >= threshold[:, None]


def dropout_mask(
    *, seed: int, request_key: str, step: int, start: int, length: int, hidden: int, delta: float
) -> Tensor:
    """The mask M of one stretch of one request: bool [length, hidden], True = kept.

    ``step`` is the number of tokens generated so far for ``mask="step"`` (the target's index when scoring) and 0
    for ``mask="sequence"``; ``start`` is the position of the first row. Rows do not depend on ``start`` or
    ``length``: asking for a part gives that part of the whole.
    """
    keys = torch.full((length,), mask_key(seed, request_key, step), dtype=torch.int64)
    positions = torch.arange(start, start + length, dtype=torch.int64)
    return keep_mask(keys, positions, hidden, torch.full((length,), delta, dtype=torch.float64))


def entropy_bits(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits) in bits over the whole vocabulary: [B, V] -> float32 [B].

    With d = x - max x and Z = Σ exp(d), the entropy is log Z - Σ exp(d)·d / Z nats.
    """
    x = logits.float()
    if len(x) == 1:  # torch sums a single row in another order than a row among others
        x = x.expand(2, -1).contiguous()
    below = (x - x.amax(dim=-1, keepdim=True)).clamp_(min=_NEGLIGIBLE)  # no 0 * inf where a logit is -inf
    weights = torch.exp(below)
    total = weights.sum(dim=-1)
    nats = total.log() - weights.mul_(below).sum(dim=-1) / total
    return nats[: len(logits)] / math.log(2.0)


def reframe(embeddings: Tensor, keep: Tensor) -> Tensor:
    """Ẽ = E ⊙ M, kept elements not rescaled: [N, hidden], bool [N, hidden] -> [N, hidden]."""
    return embeddings * keep.to(embeddings.dtype)


def combine(logits: Tensor, reframed: Tensor, beta: Tensor) -> Tensor:
    """β·logits + (1-β)·logits_r in float32: [B, V], [B, V], [B] -> [B, V]."""
    weight = beta.to(torch.float32)[:, None]
    return weight * logits.float() + (1.0 - weight) * reframed.float()
