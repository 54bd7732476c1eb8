"""Where a process is: two that have equal places can see each other by their process numbers."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = "/proc/self/ns/pid"


@cache
def here() -> str:
    """This process's place: the host's name, and what tells apart machines and containers of that name.

    Hosts share names: copies of one image, containers in the host's network. Where the rest cannot be read, the
    place is no other process's.
    """
    try:
        exactly = f"{_BOOT.read_text()}{os.readlink(_PROCESSES)}"
    except OSError:
        exactly = os.urandom(16).hex()
    return f"{socket.gethostname()}#{hashlib.sha256(exactly.encode()).hexdigest()[:8]}"


def host_name(place: str) -> str:
    """The part of a place that people know."""
    return place.partition("#")[0]
