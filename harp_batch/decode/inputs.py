"""What a forward needs on the device, brought there in few copies that the host does not wait for."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from harp_batch.decode.chunk import Chunk


@dataclass(frozen=True, slots=True)
class Inputs:
    """The rows of a packed forward."""

    tokens: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    outputs: Tensor  # int64 [R]: rows whose logits are wanted
    reframed: Tensor  # int64 [M]: rows whose embeddings are masked
    keys: Tensor  # int64 [M]: of their masks
    deltas: Tensor  # float64 [M]


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``values``; a copy to a GPU comes from pinned memory, so that the host goes on at once."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def together(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """One int64 tensor for each list, all brought over in one copy."""
    joined = on_device([value for values in lists for value in values], torch.int64, device)
    return torch.split(joined, [len(values) for values in lists])


def inputs(chunks: Sequence[Chunk], outputs: Sequence[int], rows: int, device: torch.device) -> Inputs:
    """The inputs of chunks side by side; behind them token 0 at position 0, up to ``rows`` rows."""
    lists = [*token_lists(chunks, rows), outputs, *mask_lists(chunks)]
    tokens, positions, wanted, reframed, keys, bits = together(lists, device)
    return Inputs(tokens, positions, wanted, reframed, keys, bits.view(torch.float64))


def token_lists(chunks: Sequence[Chunk], rows: int) -> tuple[list[int], list[int]]:
    """Token and position of every row, filled up with zeros."""
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    padding = [0] * (rows - len(tokens))
    return tokens + padding, [p for chunk in chunks for p in chunk.positions()] + padding


def mask_lists(chunks: Sequence[Chunk]) -> tuple[list[int], list[int], list[int]]:
    """Row, mask key and delta (its 64 bits as an integer) of every row of a reframed chunk."""
    rows: list[int] = []
    keys: list[int] = []
    deltas: list[int] = []
    for chunk, first in zip(chunks, accumulate(map(len, chunks), initial=0), strict=False):
        if chunk.mask is not None:
            rows += range(first, first + len(chunk))
            keys += [chunk.mask.key] * len(chunk)
            deltas += struct.unpack("=q", struct.pack("=d", chunk.mask.delta)) * len(chunk)
    return rows, keys, deltas
