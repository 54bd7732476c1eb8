"""Where keys and values live.

`KVPool` holds one kind of stream; `PagedPool` holds both kinds, the way paged attention reads them. In both, the
second dimension of a layer's tensors is what a slot consists of (heads, streams) and the third counts positions.
"""

from __future__ import annotations

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
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Fill a slot with zeros."""
        for keys, values in self._layers.values():
            keys[slot].zero_()
            values[slot].zero_()

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

    Per layer two tensors [capacity + 1, 2, room, Hkv, D]: of every slot the original stream, then the reframed one.
    ``room`` is a whole number of pages. The last slot belongs to nobody; padding rows write to it.

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

    def paged(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's storage as pages [P, PAGE, Hkv, D], made to fit ``keys`` and ``values`` ([Hkv, N, D])."""
        stored_k, stored_v = self.layer(index, keys, values)
        return (
            stored_k.view(-1, self.PAGE, *stored_k.shape[3:]),
            stored_v.view(-1, self.PAGE, *stored_v.shape[3:]),
        )

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.capacity + 1, 2, self.room, like.shape[0], like.shape[2])

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
        room = _whole_pages(length)
        kept = min(room, self.room)
        for index, pair in list(self._layers.items()):
            self._layers[index] = tuple(_resized(t, slots + 1, room, live, kept) for t in pair)  # type: ignore[assignment]
        self.slots, self.length, self.capacity, self.room = slots, length, slots, room
        self.storage += 1


def _whole_pages(length: int) -> int:
    return -(-length // PagedPool.PAGE) * PagedPool.PAGE
