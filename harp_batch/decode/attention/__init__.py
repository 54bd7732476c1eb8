"""Packed attention: one forward over the concatenated work of many streams.

A transformers model whose attention goes through ``AttentionInterface`` calls `packed_attention` with the rows of
all chunks side by side ([1, H, N, D]) and the `Packing` that the runner passed to the model. The packing says which
rows belong together and where their earlier keys and values are; a backend (`portable`, `varlen`) makes it. No
attention mask is ever built by transformers: for an implementation name that its mask registry does not know, it
makes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from harp_batch.decode.chunk import Chunk
from harp_batch.decode.kv import KVPool
from harp_batch.errors import ModelError

IMPLEMENTATION = "harp_packed"


@dataclass(frozen=True, slots=True)
class Style:
    """What one layer's attention adds to the plain kind."""

    scale: float
    window: int | None  # a query sees this many keys at most, its own included
    softcap: float | None  # scores become cap * tanh(scores / cap)


@dataclass(frozen=True, slots=True)
class Layer:
    """What a model's layer asks of attention; layers of a model are of one kind or a few."""

    heads: int
    kv_heads: int
    width: int  # of a query's and a key's head
    value_width: int
    dtype: torch.dtype
    style: Style


class Packing(Protocol):
    """What one forward's rows attend to."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, style: Style, /) -> Tensor:
        """q [H, N, D], k [Hkv, N, D], v [Hkv, N, Dv] -> [N, H, Dv]; stores the keys and values that are kept."""
        ...


class Backend(Protocol):
    """Makes the packing of a forward; owns the keys and values."""

    @property
    def original(self) -> KVPool:
        """The pool of the original streams; its slots and its length are the batch's."""
        ...

    @property
    def pools(self) -> Sequence[KVPool]:
        """All pools; a stream has the same slot in each."""
        ...

    def order(self, chunk: Chunk, /) -> tuple[int, bool, int]:
        """Where a chunk goes among others: those that are attended together must be neighbours."""
        ...

    def pack(self, chunks: Sequence[Chunk], device: torch.device, /) -> Packing:
        """The packing of chunks that are sorted by `order`."""
        ...


def joined(parts: Sequence[Tensor], rows: int) -> Tensor:
    """The attended rows of all groups, each [n, H, Dv], and zeros for the padding: [rows, H, Dv]."""
    padding = rows - sum(map(len, parts))
    if padding:
        parts = [*parts, parts[0].new_zeros(padding, *parts[0].shape[1:])]
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


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
