"""How a process that decodes uses the machine: CPU threads, and how it holds on to memory."""

from __future__ import annotations

import ctypes
import platform

import torch

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; the most that glibc takes on 64-bit machines
_KEPT = 1 << 30  # bytes of free heap that are not given back to the system


def prepare_process(threads: int) -> None:
    """Let torch use ``threads`` CPU threads, whatever OMP_NUM_THREADS says, and keep freed memory for reuse.

    By default glibc gives every tensor of more than some hundred kilobytes back to the system at once and asks for it
    again in the next layer; clearing those pages costs about a tenth of a forward (docs/performance.md).
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
