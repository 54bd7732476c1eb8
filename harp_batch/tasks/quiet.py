"""lm-eval and datasets without log lines and progress bars: progress is shown by the command line alone."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import datasets


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence both libraries inside of the block; what they raise still comes through."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        # Some of their bars have no switch and some messages are prints.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
