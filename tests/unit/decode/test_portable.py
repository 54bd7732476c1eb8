"""A row's attention has the same bits whoever is attended beside it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from harp_batch.decode.attention import Style
from harp_batch.decode.attention.portable import Portable
from harp_batch.decode.chunk import Chunk, Mask

LENGTH = 1024
CPU = torch.device("cpu")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention:
    """One layer over a pool whose streams are full of random keys and values."""

    def __init__(self, heads: int, kv_heads: int, width: int, slots: int) -> None:
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.backend = Portable(slots, LENGTH)
        self.keys, self.values = (random(slots, kv_heads, LENGTH, width, seed=i) for i in (1, 2))

    def __call__(self, chunks: list[Chunk], style: Style) -> list[Tensor]:
        """The attended rows [n, H, D] of each chunk; a chunk's tokens say which queries it asks."""
        pool = self.backend.original
        stored = pool.layer(0, self.keys[0], self.values[0])
        stored[0].copy_(self.keys)
        stored[1].copy_(self.values)
        packed = sorted(chunks, key=self.backend.order)
        rows = [(c.slot or 0, p) for c in packed for p in c.positions()]
        q = torch.cat([random(self.heads, 1, self.width, seed=1000 * s + p) for s, p in rows], dim=1)
        k, v = (torch.stack([t[s, :, p] for s, p in rows], dim=1) for t in (self.keys, self.values))
        out = self.backend.pack(packed, CPU).attend(0, q, k, v, style)
        parts = dict(zip(map(id, packed), torch.split(out, [len(c) for c in packed]), strict=True))
        return [parts[id(c)] for c in chunks]


def expected(attention: Attention, chunk: Chunk, style: Style) -> Tensor:
    """The same by the textbook, in float64."""
    rows = []
    for p in chunk.positions():
        slot = chunk.slot or 0
        low = max(0, p + 1 - (style.window or LENGTH))
        k, v = (t[slot, :, low : p + 1].double() for t in (attention.keys, attention.values))
        q = random(attention.heads, 1, attention.width, seed=1000 * slot + p).double()
        group = attention.heads // attention.kv_heads
        scores = (q @ k.repeat_interleave(group, 0).transpose(1, 2)) * style.scale
        rows.append((scores.softmax(-1) @ v.repeat_interleave(group, 0))[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (8, 2, 128), (4, 4, 32), (4, 1, 256)])
def test_neighbours_change_no_bit(heads: int, kv_heads: int, width: int, window: int | None) -> None:
    """Whatever they are: how many, how long, in which slots; alone, a chunk reads as few keys as it can."""
    attention, style = Attention(heads, kv_heads, width, slots=6), Style(width**-0.5, window, None)
    for rows, start in itertools.product((1, 3, 11), (5, 150, 190, 200, 300, 370, 390, 600)):
        chunk = Chunk([0] * rows, start, slot=2)
        [alone] = attention([chunk], style)
        torch.testing.assert_close(alone.double(), expected(attention, chunk, style), rtol=1e-4, atol=1e-5)
        for other in (start + 70, 390, 700, 1000):
            beside = [Chunk([0] * rows, other, slot=slot) for slot in (0, 1, 5)]
            assert torch.equal(attention([*beside, chunk], style)[-1], alone), (rows, start, other)
            assert torch.equal(attention([beside[-1], chunk], style)[-1], alone), (rows, start, other)


def test_both_streams_of_a_slot_are_attended_apart() -> None:
    backend = Portable(2, 128)
    original, reframed = Chunk([0], 3, slot=1), Chunk([0], 3, slot=1, mask=Mask(1, 0.2))
    packed = sorted([reframed, original], key=backend.order)
    assert packed == [original, reframed]
    groups = backend.pack(packed, CPU).groups
    assert [group.pool for group in groups] == [backend.original, backend.reframed]  # type: ignore[attr-defined]
