"""Packed attention: one forward over the concatenated work of many streams.

A transformers model whose attention goes through ``AttentionInterface`` calls `packed_attention` with the rows of
all chunks side by side ([1, H, N, D]) and the `Packing` that the runner passed to the model. The packing says which
rows belong together and where their earlier keys and values are. No attention mask is ever built by transformers:
for an implementation name that its mask registry does not know, it makes none.

The arithmetic for a row depends on that row's own stream alone, never on its neighbours in the batch: decode rows
use plain batched products over keys that are padded with exact zeros, and each longer chunk is computed by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from harp_batch.decode.kv import KVPool
from harp_batch.errors import ModelError

IMPLEMENTATION = "harp_packed"
_QUERY_BLOCK = 256  # rows of a chunk that are attended at a time, counted from the chunk's own beginning
_KEY_BLOCK = 64  # decode reads keys in multiples of this, so that padding always ends on a vector boundary


@dataclass(frozen=True, slots=True)
class Style:
    """What one layer's attention adds to the plain kind."""

    scale: float
    window: int | None  # a query sees this many keys at most, its own included
    softcap: float | None  # scores become cap * tanh(scores / cap)


class Group(Protocol):
    """Rows of a packed forward that are attended together."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style, /) -> Tensor:
        """This group's rows of q [H, N, D], k and v [Hkv, N, D] -> [rows, H, Dv]; stores what is to be kept."""
        ...

    @property
    def rows(self) -> slice:
        """Which rows of the packed forward."""
        ...


@dataclass(frozen=True, slots=True)
class Packing:
    """All groups of one forward; together they cover its rows, but for padding at the end."""

    groups: Sequence[Group]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """q [H, N, D], k [Hkv, N, D], v [Hkv, N, Dv] -> [N, H, Dv]."""
        out = q.new_zeros(q.shape[1], q.shape[0], v.shape[2])
        for group in self.groups:
            out[group.rows] = group.attend(layer, q, k, v, style)
        return out


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The function behind `IMPLEMENTATION`: query [1, H, N, D] -> [1, N, H, Dv]."""
    refuse_unknown(module, attention_mask, unused)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    style = Style(scale, sliding_window, softcap)
    out = packing.attend(int(module.layer_idx), query[0], key[0], value[0], style)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


def refuse_unknown(module: nn.Module, attention_mask: Tensor | None, unused: dict[str, Any]) -> None:
    """An attention feature that this code does not know would give wrong answers in silence: refuse it."""
    inert = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"}
    strange = [name for name, value in unused.items() if name not in inert and value is not None]
    if attention_mask is not None:
        strange.append("attention_mask")
    if unused.get("is_causal") is False:
        strange.append("is_causal=False")
    if strange:
        raise ModelError(
            f"{type(module).__name__} asks for attention that harp-batch does not support: {', '.join(strange)}"
        )


AttentionInterface.register(IMPLEMENTATION, packed_attention)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """One new row for each of several streams that have their earlier keys and values in one pool."""

    rows: slice
    pool: KVPool
    slots: Tensor  # int64 [B]
    positions: Tensor  # int64 [B]: where the new row goes; it sees the keys 0..position
    longest: int  # 1 + the largest position
    dense: bool  # the slots are exactly 0..B-1: read a view, not a copy

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `Group.attend`."""
        q, k, v = q[:, self.rows], k[:, self.rows], v[:, self.rows]
        stored_k, stored_v = self.pool.layer(layer, k, v)
        stored_k[self.slots, :, self.positions] = k.transpose(0, 1)
        stored_v[self.slots, :, self.positions] = v.transpose(0, 1)
        length = min(-(-self.longest // _KEY_BLOCK) * _KEY_BLOCK, self.pool.length)
        keys, values = self._read(stored_k, length), self._read(stored_v, length)  # [B, Hkv, L, D]
        q = q.transpose(0, 1).reshape(q.shape[1], k.shape[0], -1, q.shape[2])  # [B, Hkv, G, D]
        hidden = self._hidden(length, style.window)[:, None, None, :]
        return _softmax_product(q, keys, values, hidden, style).flatten(1, 2)

    def _read(self, stored: Tensor, length: int) -> Tensor:
        head = stored[:, :, :length]
        return head[: len(self.slots)] if self.dense else head.index_select(0, self.slots)

    def _hidden(self, length: int, window: int | None) -> Tensor:
        """Which keys each row must not see: bool [B, L]."""
        return _hidden_keys(self.positions, length, window)


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """Consecutive new rows of one stream; its earlier rows, if any, are in a pool."""

    rows: slice
    start: int  # position of the first row
    pool: KVPool | None  # None: nothing is kept, so start is 0
    slot: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `Group.attend`."""
        q, k, v = q[:, self.rows], k[:, self.rows], v[:, self.rows]
        if self.pool is not None:
            k, v = self._store(layer, k, v)
        return _stream(q, k, v, self.start, style)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new rows and return all rows of the stream so far: [Hkv, start + n, D]."""
        assert self.pool is not None
        stored_k, stored_v = self.pool.layer(layer, k, v)
        end = self.start + k.shape[1]
        stored_k[self.slot, :, self.start : end] = k
        stored_v[self.slot, :, self.start : end] = v
        return stored_k[self.slot, :, :end], stored_v[self.slot, :, :end]


@dataclass(frozen=True, slots=True)
class BranchedGroup:
    """A stream from its beginning that ends in several branches; nothing is kept."""

    rows: slice
    stem: int  # rows before the first branch
    branches: tuple[int, ...]  # rows of each branch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:  # noqa: ARG002
        """See `Group.attend`."""
        sizes = [self.stem, *self.branches]
        qs, ks, vs = (torch.split(t[:, self.rows], sizes, dim=1) for t in (q, k, v))
        done = [_stream(qs[0], ks[0], vs[0], 0, style)]
        for branch_q, branch_k, branch_v in zip(qs[1:], ks[1:], vs[1:], strict=True):
            whole_k, whole_v = torch.cat([ks[0], branch_k], dim=1), torch.cat([vs[0], branch_v], dim=1)
            done.append(_stream(branch_q, whole_k, whole_v, self.stem, style))
        return torch.cat(done)


def _stream(q: Tensor, k: Tensor, v: Tensor, start: int, style: Style) -> Tensor:
    """Rows ``start``.. of one stream, q [H, n, D], over all of its rows so far, k and v [Hkv, start + n, D]."""
    if start == 0 and style.window is None and style.softcap is None:
        return _causal(q, k, v, style.scale)
    parts = torch.split(
        q, _QUERY_BLOCK, dim=1
    )  # so that the scores of a long prefix need not all be in memory
    starts = range(start, start + q.shape[1], _QUERY_BLOCK)
    return torch.cat([_masked(part, k, v, at, style) for part, at in zip(parts, starts, strict=True)])


def _masked(q: Tensor, k: Tensor, v: Tensor, start: int, style: Style) -> Tensor:
    """Consecutive rows q [H, n, D], the first at position ``start``, over the keys that they may see."""
    n = q.shape[1]
    k, v = k[:, : start + n], v[:, : start + n]
    positions = torch.arange(start, start + n, device=q.device)
    hidden = _hidden_keys(positions, k.shape[1], style.window)  # [n, L]
    grouped = q.reshape(k.shape[0], -1, n, q.shape[2])  # [Hkv, G, n, D]
    out = _softmax_product(grouped, k[:, None], v[:, None], hidden, style)
    return out.flatten(0, 1).transpose(0, 1)


def _hidden_keys(positions: Tensor, length: int, window: int | None) -> Tensor:
    """Later keys, and those that fell out of the window: int64 [n] -> bool [n, length]."""
    keys = torch.arange(length, device=positions.device)
    hidden = keys[None, :] > positions[:, None]
    if window is not None:
        hidden |= keys[None, :] <= positions[:, None] - window
    return hidden


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, style: Style) -> Tensor:
    """softmax(q·kᵀ·scale)·v with plain products: [..., n, D], [..., L, D], [..., L, Dv] -> [..., n, Dv].

    Hidden keys get an exact zero, and the division by the sum comes after the product with v, so that more
    padding changes no bit.
    """
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * style.scale
    if style.softcap is not None:
        scores = torch.tanh(scores / style.softcap) * style.softcap
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    total = weights.sum(dim=-1, keepdim=True)
    return (torch.matmul(weights.to(v.dtype), v).float() / total).to(v.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One stream from its beginning: q [H, n, D], k and v [Hkv, n, D] -> [n, H, Dv]."""
    out = nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=q.shape[0] != k.shape[0]
    )
    return out[0].transpose(0, 1)
