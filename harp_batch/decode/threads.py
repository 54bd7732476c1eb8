"""How many CPU cores decoding may use in this process."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Let torch use ``count`` CPU threads, whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(count)
