"""Where keys and values live.

`KVPool` holds one kind of stream; `PagedPool` holds both kinds, the way paged attention reads them. In both, a layer's
tensors can be seen by slots: the second dimension is what a slot consists of (heads, streams), the third counts
positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor


class KVPool:
    """Keys and values of up to ``slots`` streams of up to ``length`` positions.

    Per layer two tensors [slots, Hkv, length, D], allocated when the layer is first written, so that no
    architecture's head layout is guessed from its configuration. Slots 0..live-1 are in use and dense (the batcher
    moves the last one into a hole), so that a decode step reads one contiguous view instead of gathering a copy.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots = slots
        self.length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's storage, made to fit ``keys`` and ``values`` ([Hkv, N, D]) on first use."""
        if index not in self._layers:
            self._layers[index] = (self._allocate(keys), self._allocate(values))
        return self._layers[index]

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, not empty: masked positions are multiplied by a zero probability, and 0 * NaN is NaN.
        return like.new_zeros(self.slots, like.shape[0], self.length, like.shape[2])

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of slot ``source`` over slot ``target``."""
        for slots in self._by_slot():
            slots[target, :, :length] = slots[source, :, :length]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Fill a slot with zeros."""
        for slots in self._by_slot():
            slots[slot].zero_()

    def _by_slot(self) -> Iterator[Tensor]:
        """All that is stored; the first dimension counts slots and the third positions."""
        for pair in self._layers.values():
            yield from pair

    def release(self) -> None:
        """Give the memory back; nothing may be live."""
        self._layers.clear()
        self.slots = self.length = 0

    @torch.inference_mode()
    def resize(self, slots: int, length: int, live: int) -> None:
        """Change the shape, keeping the first ``live`` slots; layer by layer, so that the peak stays low."""
        kept = min(length, self.length)
        for index, pair in list(self._layers.items()):
            self._layers[index] = tuple(_resized(t, slots, length, live, kept) for t in pair)  # type: ignore[assignment]
        self.slots, self.length = slots, length


def _resized(old: Tensor, slots: int, length: int, live: int, kept: int) -> Tensor:
    new = torch.zeros(slots, old.shape[1], length, *old.shape[3:], dtype=old.dtype, device=old.device)
    new[:live, :, :kept] = old[:live, :, :kept]
    return new


class PagedPool(KVPool):
    """Keys and values of both streams of every slot, in pages for attention with a block table.

    Per layer two tensors [P, PAGE, Hkv, D]: of every slot the pages of the original stream, then as many of the
    reframed one. One page more, the last, belongs to nobody; padding rows write to it.

    Memory only grows, until it is released: graphs that were captured over it stay valid as long as ``storage`` is
    the same number.
    """

    PAGE: ClassVar[int] = 256  # positions; flash attention 2 takes multiples of it

    def __init__(self, slots: int, length: int) -> None:
        super().__init__(slots, length)
        self.capacity = slots
        self.room = _whole_pages(length)
        self.storage = 0  # counts how often the memory was replaced

    @property
    def pages(self) -> int:
        """Pages of one stream."""
        return self.room // self.PAGE

    @property
    def last_page(self) -> int:
        """The index of the page that belongs to nobody."""
        return 2 * self.capacity * self.pages

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.last_page + 1, self.PAGE, like.shape[0], like.shape[2])

    def _by_slot(self) -> Iterator[Tensor]:
        return (self._slots(tensor) for tensor in super()._by_slot())

    def _slots(self, pages: Tensor) -> Tensor:
        """A layer's keys or values without nobody's page: [capacity, 2, room, Hkv, D]."""
        return pages[:-1].view(self.capacity, 2, self.room, *pages.shape[2:])

    def release(self) -> None:
        """See `KVPool.release`."""
        super().release()
        self.capacity = self.room = 0
        self.storage += 1

    @torch.inference_mode()
    def resize(self, slots: int, length: int, live: int) -> None:
        """See `KVPool.resize`; memory that suffices stays as it is."""
        if slots <= self.capacity and length <= self.room:
            self.slots, self.length = slots, length
            return
        new = PagedPool(slots, length)
        kept = min(new.room, self.room)
        for index, pair in list(self._layers.items()):
            self._layers[index] = tuple(self._copied(t, new, live, kept) for t in pair)  # type: ignore[assignment]
        self.slots, self.length, self.capacity, self.room = slots, length, new.capacity, new.room
        self.storage += 1

    def _copied(self, old: Tensor, pool: PagedPool, live: int, kept: int) -> Tensor:
        """A layer's keys or values, laid out as in ``pool``."""
        new = old.new_zeros(pool.last_page + 1, *old.shape[1:])
        pool._slots(new)[:live, :, :kept] = self._slots(old)[:live, :, :kept]
        return new


def _whole_pages(length: int) -> int:
    return -(-length // PagedPool.PAGE) * PagedPool.PAGE
