"""The command line: one module a command, `app` puts them together.

Nothing here imports torch, ray or lm-eval before a command needs it, so that ``--help`` is quick.
"""

from __future__ import annotations

from harp_batch.cli.app import main

__all__ = ["main"]
