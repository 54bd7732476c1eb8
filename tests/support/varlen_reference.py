"""What torch.nn.attention.varlen.varlen_attn is documented to do, in plain loops: for machines without a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """query [T, H, D]; key and value [K, Hkv, D] or pages [P, page, Hkv, D] -> [T, H, D]; other rows are NaN.

    Checks what flash attention 2 checks, and that no key beyond ``max_k`` or query beyond ``max_q`` is asked for.
    """
    for index in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert index is None or (index.dtype == torch.int32 and index.is_contiguous())
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert len(cu_seq_q) == len(cu_seq_k)
    assert (block_table is None) == (seqused_k is None)
    assert num_splits == 1
    assert enable_gqa or query.shape[1] == key.shape[-2]
    out = torch.full_like(query, float("nan"))
    starts = cu_seq_q.tolist()
    for i, (first, end) in enumerate(pairwise(starts)):
        k, v = (_keys(t, i, cu_seq_k, seqused_k, block_table) for t in (key, value))
        assert end - first <= max_q
        assert len(k) <= max_k
        if end > first:
            out[first:end] = _attend(query[first:end], k, v, scale, window_size)
    return out


def _keys(
    stored: Tensor, i: int, cu_seq_k: Tensor, seqused_k: Tensor | None, block_table: Tensor | None
) -> Tensor:
    """The keys (or values) of sequence ``i``: [n, Hkv, D]."""
    if block_table is None or seqused_k is None:
        return stored[int(cu_seq_k[i]) : int(cu_seq_k[i + 1])]
    page = stored.shape[1]
    assert page % 256 == 0
    assert stored.is_contiguous()
    pages = [stored[p] for p in block_table[i].tolist()]
    return torch.cat(pages)[: int(seqused_k[i])]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
    """The last query is aligned with the last key; one row and one head at a time."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for row in range(len(q)):
        position = len(k) - len(q) + row
        first = max(position - window[0], 0) if window[0] >= 0 else 0
        last = position + window[1] if window[1] >= 0 else len(k) - 1
        for head in range(q.shape[1]):
            keys, values = (t[first : last + 1, head // group] for t in (k, v))
            scores = keys @ q[row, head] * (scale if scale is not None else q.shape[2] ** -0.5)
            out[row, head] = torch.softmax(scores, 0) @ values
    return out
