"""Packed attention by flash attention, through torch.nn.attention.varlen: the backend of CUDA GPUs.

A layer's attention is one call for all streams that are in the pool (decode rows, reframed rows that catch up, prompt
chunks alike) and one for all chunks that keep nothing. What the calls need is brought to the device once a forward.

``num_splits=1``: a row's keys are summed up in one go, so that no neighbour changes the order; docs/design.md says
where that ends. (Other values are also wrong: with a block table torch 2.13 loses rows, pytorch/pytorch#194167.)
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from harp_batch.decode.attention import Layer, Style, joined
from harp_batch.decode.attention.portable import Portable
from harp_batch.decode.chunk import Chunk, Mask
from harp_batch.decode.inputs import together
from harp_batch.decode.kv import PagedPool

_WIDEST = 256  # flash attention's largest head; widths are multiples of 8
_TOLERANCE = 0.05  # of attention over standard normal values, computed in half precision
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Spans:
    """Which rows are sequences to the kernel; the last query of each sees its last key."""

    cu_q: Tensor  # int32 [B + 1]: where each sequence's queries begin
    cu_k: Tensor  # int32 [B + 1]: likewise its keys; of pages, which have a table, it is not read
    max_q: int  # no sequence has more queries
    max_k: int  # nor more keys


@dataclass(frozen=True, slots=True)
class Kept:
    """The first ``rows`` rows of a forward: new rows of streams that are in the pool."""

    pool: PagedPool
    rows: int
    write: Tensor  # int64 [rows]: each row's place among all positions of the pool
    spans: Spans  # a sequence for each stream
    used: Tensor  # int32 [B]: keys of each stream, the new ones included
    table: Tensor  # int32 [B, pages]: each stream's pages

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """Stores the rows' k and v [Hkv, n, D]; q [H, n, D] -> [n, H, D]."""
        keys, values = self.pool.layer(layer, k, v)
        keys.flatten(0, 1).index_copy_(0, self.write, k.transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, self.write, v.transpose(0, 1))
        return _flash(q, keys, values, self.spans, style, self.used, self.table)


@dataclass(frozen=True, slots=True)
class Loose:
    """Rows of streams from their beginning, of which nothing is kept.

    Every stem and every branch is a sequence of its own to the kernel; a branch's keys are the stem's and its own.
    """

    rows: slice
    keys: Tensor | None  # int64 [K]: rows to read keys from, counted from the first; None: all, as they lie
    spans: Spans

    def attend(self, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """q [H, n, D], k and v [Hkv, n, D] -> [n, H, D]."""
        if self.keys is not None:
            k, v = k.index_select(1, self.keys), v.index_select(1, self.keys)
        return _flash(q, k.transpose(0, 1), v.transpose(0, 1), self.spans, style)


@dataclass(frozen=True, slots=True)
class VarlenPacking:
    """The rows that are kept, those that are not, and behind them only padding."""

    kept: Kept | None
    loose: Loose | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style) -> Tensor:
        """See `attention.Packing`."""
        done: list[Tensor] = []
        if self.kept:
            n = self.kept.rows
            done.append(self.kept.attend(layer, q[:, :n], k[:, :n], v[:, :n], style))
        if self.loose:
            rows = self.loose.rows
            done.append(self.loose.attend(q[:, rows], k[:, rows], v[:, rows], style))
        return joined(done, q.shape[1])


class Varlen:
    """Makes the packing of a forward; owns the keys and values of both kinds of stream."""

    def __init__(self, slots: int, length: int) -> None:
        self.original = PagedPool(slots, length)

    @property
    def pools(self) -> tuple[PagedPool]:
        """The one pool, in which each slot has both streams."""
        return (self.original,)

    def order(self, chunk: Chunk) -> tuple[int, bool, int]:
        """See `attention.Backend`."""
        return int(chunk.slot is None), chunk.mask is not None, chunk.slot or 0

    def pack(self, chunks: Sequence[Chunk], device: torch.device) -> VarlenPacking:
        """See `attention.Backend`."""
        kept = [c for c in chunks if c.slot is not None]
        loose = [c for c in chunks if c.slot is None]
        sequences = [s for c in loose for s in _sequences(c)]
        tensors = together([*kept_lists(kept, self.original), *_loose_lists(loose, sequences)], device)
        rows = sum(map(len, kept))
        return VarlenPacking(
            kept_rows(self.original, rows, _longest(map(len, kept)), *tensors[:4]) if kept else None,
            _loose_rows(rows, loose, sequences, *tensors[4:]) if loose else None,
        )


def kept_lists(chunks: Sequence[Chunk], pool: PagedPool) -> tuple[list[int], list[int], list[int], list[int]]:
    """What `kept_rows` needs of chunks whose streams are in the pool."""
    streams = [_stream(c) for c in chunks]
    write = [s * pool.room + p for s, c in zip(streams, chunks, strict=True) for p in c.positions()]
    return write, [*accumulate(map(len, chunks), initial=0)], streams, [c.end for c in chunks]


def kept_rows(
    pool: PagedPool, rows: int, max_q: int, write: Tensor, cu_q: Tensor, streams: Tensor, used: Tensor
) -> Kept:
    """The first rows of a forward: int64 tensors [rows], [B + 1], [B] and [B], as `kept_lists` lists them."""
    pages = torch.arange(pool.pages, device=streams.device)
    table = streams[:, None] * pool.pages + pages
    return Kept(
        pool=pool,
        rows=rows,
        write=write,
        spans=Spans(cu_q.int(), nn.functional.pad(used.cumsum(0), (1, 0)).int(), max_q, pool.room),
        used=used.int(),
        table=table.clamp(max=pool.last_page).int(),  # nobody's stream has a single page
    )


def _stream(chunk: Chunk) -> int:
    """The place of a chunk's stream in the pool."""
    assert chunk.slot is not None
    return 2 * chunk.slot + (chunk.mask is not None)


def _sequences(chunk: Chunk) -> list[tuple[int, int]]:
    """How many queries and how many keys each part of a chunk has that keeps nothing: its stem, then its branches."""
    return [(chunk.stem, chunk.stem), *((n, chunk.stem + n) for n in chunk.branches)]


def _loose_lists(
    chunks: Sequence[Chunk], sequences: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int], list[int]]:
    """Where the sequences' queries begin, where their keys do, and the rows of the keys if any is read twice."""
    keys: list[int] = []
    if any(c.branches for c in chunks):
        first = 0
        for chunk in chunks:
            stem = range(first, first + chunk.stem)
            first += len(stem)
            keys += stem
            for length in chunk.branches:
                keys += [*stem, *range(first, first + length)]
                first += length
    cu_q, cu_k = ([*accumulate((s[i] for s in sequences), initial=0)] for i in (0, 1))
    return cu_q, cu_k, keys


def _loose_rows(
    first: int,
    chunks: Sequence[Chunk],
    sequences: Sequence[tuple[int, int]],
    cu_q: Tensor,
    cu_k: Tensor,
    keys: Tensor,
) -> Loose:
    longest_q, longest_k = _longest(q for q, _ in sequences), _longest(k for _, k in sequences)
    return Loose(
        rows=slice(first, first + sum(map(len, chunks))),
        keys=keys if len(keys) else None,
        spans=Spans(cu_q.int(), cu_k.int(), longest_q, longest_k),
    )


def _longest(lengths: Iterable[int]) -> int:
    return max(lengths, default=0)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    style: Style,
    used: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [H, n, D] over k and v ([K, Hkv, D], or pages [P, PAGE, Hkv, D]) -> [n, H, D]."""
    out = varlen.varlen_attn(
        q.transpose(0, 1),
        k,
        v,
        spans.cu_q,
        spans.cu_k,
        spans.max_q,
        spans.max_k,
        scale=style.scale,
        window_size=(-1 if style.window is None else style.window - 1, 0),
        enable_gqa=q.shape[0] != k.shape[-2],
        seqused_k=used,
        block_table=table,
        num_splits=1,
    )
    assert isinstance(out, Tensor)  # a pair only where more is asked for
    return out


def runs(device: torch.device, layers: Collection[Layer]) -> bool:
    """Whether flash attention computes all these layers here; tried out, since torch's releases differ.

    Before 2.13 the function lacks parameters, or torch's own kernels refuse ``num_splits``.
    """
    if device.type != "cuda" or not all(map(_takes, layers)):
        return False
    try:
        wrong = [layer for layer in layers if not _agrees(layer, device)]
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        _log.warning("decoding without flash attention, more slowly: %s", str(error).partition("\n")[0])
        return False
    if wrong:
        _log.warning("decoding without flash attention, more slowly: it gives wrong results for %s", wrong[0])
    return not wrong


def _takes(layer: Layer) -> bool:
    return (
        layer.dtype in (torch.float16, torch.bfloat16)
        and layer.style.softcap is None
        and layer.width == layer.value_width <= _WIDEST
        and layer.width % 8 == 0
    )


_FULL, _FRESH, _MASK = 290, 9, Mask(0, 0.0)
_TRIAL = (
    (Chunk([0] * _FULL, 0, slot=0), Chunk([0] * _FRESH, 0, slot=1)),
    (
        Chunk([0], _FULL, slot=0),
        Chunk([0], _FRESH, slot=1),
        Chunk([0] * 3, 0, slot=1, mask=_MASK),
        Chunk([0] * 12, 0, branches=(2, 3)),
    ),
    (Chunk([0] * 2, _FRESH + 1, slot=1), Chunk([0] * 4, 3, slot=1, mask=_MASK)),
)  # forwards: prompts over more than one page; then every other kind of work


@torch.inference_mode()
def _agrees(layer: Layer, device: torch.device) -> bool:
    """Whether a few forwards give what the portable backend gives in float32."""
    generator = torch.Generator().manual_seed(0)
    tried, trusted = Varlen(2, _FULL + 1), Portable(2, _FULL + 1)
    for chunks in _TRIAL:
        rows = sum(map(len, chunks))
        q, k, v = (
            torch.randn(heads, rows, layer.width, generator=generator).to(device, layer.dtype)
            for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
        )
        got = tried.pack(chunks, device).attend(0, q, k, v, layer.style)
        expected = trusted.pack(chunks, device).attend(0, q.float(), k.float(), v.float(), layer.style)
        if not bool((got.float() - expected).abs().amax() < _TOLERANCE):
            return False
    return True
