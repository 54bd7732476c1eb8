"""Packed attention on any device, of plain products: the backend of the CPU.

A row's arithmetic depends on its own request alone, never on its neighbours in the batch. Short chunks whose stream is
in a pool (decode rows, reframed rows that catch up) go side by side through batched products over keys that are
padded with exact zeros, in grids whose width follows from the chunk itself. Longer chunks are computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from harp_batch.decode.attention import Style, joined
from harp_batch.decode.chunk import Chunk
from harp_batch.decode.kv import KVPool

_WIDTHS = (1, 4, 16)  # rows of a stream that are attended together; longer chunks go alone
_KEY_BLOCK = 64  # keys are read in multiples of this, so that padding always ends on a vector boundary
_VALUE_BLOCK = 128  # keys whose values are summed up in one product
_QUERY_BLOCK = 256  # rows of a long chunk that are attended at a time, counted from the chunk's own beginning
_DENSE = 2  # read a pool's slots as they lie, the idle ones too, where at least one in so many takes part


class Group(Protocol):
    """Rows of a packed forward that are attended together."""

    @property
    def rows(self) -> slice:
        """Which rows of the packed forward."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style, /) -> Tensor:
        """This group's rows of q [H, n, D], k and v [Hkv, n, D] -> [n, H, Dv]; stores what is to be kept."""
        ...


@dataclass(frozen=True, slots=True)
class PortablePacking:
    """All groups of one forward, in the order of their rows; behind them only padding."""

    groups: Sequence[Group]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `attention.Packing`."""
        done = [g.attend(layer, q[:, g.rows], k[:, g.rows], v[:, g.rows], style) for g in self.groups]
        return joined(done, q.shape[1])


class Portable:
    """Makes the packing of a forward; owns the keys and values."""

    def __init__(self, slots: int, length: int) -> None:
        self.original = KVPool(slots, length)
        self.reframed = KVPool(slots, length)  # allocates nothing until a method keeps a reframed stream

    @property
    def pools(self) -> tuple[KVPool, KVPool]:
        """The pool of the original streams, and that of the reframed ones."""
        return self.original, self.reframed

    def order(self, chunk: Chunk) -> tuple[int, bool, int]:
        """Where a chunk goes among others: those that are attended together must be neighbours."""
        return _width(chunk) or _WIDTHS[-1] + 1, chunk.mask is not None, chunk.slot or 0

    def pack(self, chunks: Sequence[Chunk], device: torch.device) -> PortablePacking:
        """The packing of chunks that are sorted by `order`."""
        groups: list[Group] = []
        row = 0
        for alike in _runs(chunks):
            first, rows = alike[0], sum(map(len, alike))
            if _width(first):
                pool = self.original if first.mask is None else self.reframed
                groups.append(grid(alike, row, pool, device))
            else:
                groups.append(self._single(first, slice(row, row + rows)))
            row += rows
        return PortablePacking(groups)

    def _single(self, chunk: Chunk, rows: slice) -> Group:
        if chunk.branches:
            return BranchedGroup(rows, chunk.stem, tuple(chunk.branches))
        if chunk.slot is None:
            return LongGroup(rows, chunk.start, None, 0)
        return LongGroup(
            rows, chunk.start, self.original if chunk.mask is None else self.reframed, chunk.slot
        )


def _width(chunk: Chunk) -> int | None:
    """The width of the grid that the chunk belongs to; None if it is attended by itself."""
    if chunk.slot is None or chunk.start == 0:
        return None
    return next((width for width in _WIDTHS if len(chunk) <= width), None)


def _runs(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Neighbours that share a grid; every other chunk by itself."""
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        last = runs[-1][-1] if runs else None
        together = last and _width(chunk) and _width(last) == _width(chunk)
        if last and together and (last.mask is None) == (chunk.mask is None):
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs


@dataclass(frozen=True, slots=True)
class GridGroup:
    """Up to W new rows for each of several streams that have their earlier keys and values in one pool."""

    rows: slice
    pool: KVPool
    slots: Tensor  # int64 [n]: of each row
    positions: Tensor  # int64 [n]: of each row; it sees the keys 0..position
    streams: slice | Tensor  # the B slots that are read: those from 0 on as they lie, or int64 [B] to gather
    grid: Tensor  # int64 [B, W]: positions again; a place without a row has the largest one
    places: Tensor | None  # int64 [n]: each row's place in the B x W grid; None: row i is at place i
    length: int  # L: keys that are read
    biases: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `Group`."""
        stored_k, stored_v = self.pool.layer(layer, k, v)
        stored_k[self.slots, :, self.positions] = k.transpose(0, 1)
        stored_v[self.slots, :, self.positions] = v.transpose(0, 1)
        keys, values = (stored[self.streams, :, : self.length] for stored in (stored_k, stored_v))
        out = _softmax_product(self._spread(q, len(k)), keys, values, self._bias(style.window), style)
        return self._collect(out, len(q))

    def _spread(self, q: Tensor, kv_heads: int) -> Tensor:
        """q [H, n, D] -> [B, Hkv, G, W, D]."""
        rows = q.transpose(0, 1)
        if self.places is not None:
            rows = q.new_zeros(self.grid.numel(), *rows.shape[1:]).index_copy_(0, self.places, rows)
        return rows.reshape(*self.grid.shape, kv_heads, -1, q.shape[2]).permute(0, 2, 3, 1, 4)

    def _collect(self, out: Tensor, heads: int) -> Tensor:
        """[B, Hkv, G, W, Dv] -> [n, H, Dv]."""
        rows = out.permute(0, 3, 1, 2, 4).reshape(self.grid.numel(), heads, out.shape[-1])
        return rows if self.places is None else rows.index_select(0, self.places)

    def _bias(self, window: int | None) -> Tensor:
        """What is added to the scores, by window: float32 [B, 1, 1, W, L]."""
        if window not in self.biases:
            self.biases[window] = _bias(self.grid, self.length, window)[:, None, None]
        return self.biases[window]


def grid(chunks: Sequence[Chunk], first_row: int, pool: KVPool, device: torch.device) -> GridGroup:
    """The group of chunks of one width and one pool, sorted by slot."""
    width = _width(chunks[0]) or 1
    slots = [c.slot or 0 for c in chunks]
    dense = (slots[-1] + 1) <= _DENSE * len(slots)
    streams = list(range(slots[-1] + 1)) if dense else slots
    rank = {slot: i for i, slot in enumerate(streams)}
    places = [rank[c.slot or 0] * width + j for c in chunks for j in range(len(c))]
    positions = [p for c in chunks for p in c.positions()]
    longest = max(positions) + 1
    table = torch.full((len(streams) * width,), longest - 1)
    table[places] = torch.tensor(positions)
    whole = places == list(range(len(streams) * width))
    return GridGroup(
        rows=slice(first_row, first_row + len(places)),
        pool=pool,
        slots=torch.tensor([c.slot or 0 for c in chunks for _ in range(len(c))], device=device),
        positions=torch.tensor(positions, device=device),
        streams=slice(len(streams)) if dense else torch.tensor(slots, device=device),
        grid=table.view(-1, width).to(device),
        places=None if whole else torch.tensor(places, device=device),
        length=min(-(-longest // _KEY_BLOCK) * _KEY_BLOCK, pool.length),
    )


@dataclass(frozen=True, slots=True)
class LongGroup:
    """Consecutive new rows of one stream; its earlier rows, if any, are in a pool."""

    rows: slice
    start: int  # position of the first row
    pool: KVPool | None  # None: nothing is kept, so start is 0
    slot: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `Group`."""
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
        """See `Group`."""
        sizes = [self.stem, *self.branches]
        qs, ks, vs = (torch.split(t, sizes, dim=1) for t in (q, k, v))
        done = [_stream(qs[0], ks[0], vs[0], 0, style)]
        for branch_q, branch_k, branch_v in zip(qs[1:], ks[1:], vs[1:], strict=True):
            whole_k, whole_v = torch.cat([ks[0], branch_k], dim=1), torch.cat([vs[0], branch_v], dim=1)
            done.append(_stream(branch_q, whole_k, whole_v, self.stem, style))
        return torch.cat(done)


def _stream(q: Tensor, k: Tensor, v: Tensor, start: int, style: Style) -> Tensor:
    """Rows ``start``.. of one stream, q [H, n, D], over all of its rows so far, k and v [Hkv, start + n, D]."""
    if start == 0 and style.window is None and style.softcap is None:
        return _causal(q, k, v, style.scale)
    # In parts, so that the scores of a long prefix need not all be in memory.
    parts = torch.split(q, _QUERY_BLOCK, dim=1)
    starts = range(start, start + q.shape[1], _QUERY_BLOCK)
    return torch.cat([_part(part, k, v, at, style) for part, at in zip(parts, starts, strict=True)])


def _part(q: Tensor, k: Tensor, v: Tensor, start: int, style: Style) -> Tensor:
    """Consecutive rows q [H, n, D], the first at position ``start``, over the keys that they may see."""
    end = start + q.shape[1]
    k, v = k[:, :end], v[:, :end]
    bias = _bias(torch.arange(start, end, device=q.device), end, style.window)
    grouped = q.reshape(1, k.shape[0], -1, *q.shape[1:])  # [1, Hkv, G, n, D]
    return _softmax_product(grouped, k[None], v[None], bias, style)[0].flatten(0, 1).transpose(0, 1)


def _bias(positions: Tensor, length: int, window: int | None) -> Tensor:
    """0 for keys that a row sees, -inf for later ones and for those out of the window: [...] -> [..., length]."""
    keys = torch.arange(length, device=positions.device)
    hidden = keys > positions[..., None]
    if window is not None:
        hidden |= keys <= positions[..., None] - window
    return torch.zeros(hidden.shape, device=positions.device).masked_fill_(hidden, float("-inf"))


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, style: Style) -> Tensor:
    """softmax(q·kᵀ·scale + bias)·v: [B, Hkv, G, W, D], [B, Hkv, L, D], [B, Hkv, L, Dv] -> [B, Hkv, G, W, Dv].

    A hidden key has an exact zero for its weight, so that more of them change no bit.
    """
    shape = q.shape[:-1]
    scores = torch.matmul(q.flatten(2, 3) * style.scale, k.transpose(-1, -2))
    if style.softcap is not None:
        scores = torch.tanh(scores.float() / style.softcap) * style.softcap
    weights = torch.softmax(scores.view(*shape, -1).float().add_(bias), dim=-1).to(v.dtype)
    return _weighted_sum(weights.flatten(2, 3), v).view(*shape, -1)


def _weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """weights·v: [B, Hkv, M, L], [B, Hkv, L, Dv] -> [B, Hkv, M, Dv], in the same order however many zeros end L.

    A BLAS library sums over a long L in parts whose size depends on L (MKL: halves between 192 and 384); parts of a
    fixed size, counted from the first key, leave it no choice.
    """
    parts = zip(torch.split(weights, _VALUE_BLOCK, dim=3), torch.split(v, _VALUE_BLOCK, dim=2), strict=True)
    first, *rest = (torch.matmul(w, values) for w, values in parts)
    total = first.float()
    for part in rest:
        total += part
    return total.to(v.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One stream from its beginning: q [H, n, D], k and v [Hkv, n, D] -> [n, H, Dv]."""
    out = nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=q.shape[0] != k.shape[0]
    )
    return out[0].transpose(0, 1)
