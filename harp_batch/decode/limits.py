"""How long a sequence may be, and how many positions the KV pools may hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from harp_batch.errors import ModelError

_SHARE = 0.5  # of the memory that is free once the model is loaded
_POOLS = 2  # original and reframed


def context_length(config: Any) -> int:
    """Positions that every answer may rely on.

    Rotary embeddings of the kinds ``dynamic`` and ``longrope`` change for a whole batch once a sequence in it
    outgrows the original context; an answer would then depend on its neighbours, so the original context is the
    limit there.

    Raises:
        ModelError: the configuration names no context length.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    if rope.get("rope_type") in ("dynamic", "longrope") and original:
        return int(original)
    if not getattr(text, "max_position_embeddings", None):
        raise ModelError(f"the {text.model_type} configuration names no max_position_embeddings")
    return int(text.max_position_embeddings)


def kv_positions(bytes_per_position: int, device: torch.device) -> int:
    """How many positions fit into half of the free memory, in both pools together."""
    return int(_free_bytes(device) * _SHARE) // (bytes_per_position * _POOLS)


_ALLOCATION_FAILED = ("out of memory", "out_of_memory", "alloc_failed", "allocate memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch's CPU allocator, cuBLAS and oneDNN tell it by the message alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _ALLOCATION_FAILED)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
