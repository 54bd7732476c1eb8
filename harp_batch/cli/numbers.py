"""Numbers as people read them; ``None`` is always ``-``."""

from __future__ import annotations

from harp_batch.cli.output import UNDEFINED

# Metrics whose values may lie between 0 and 1 and are no proportions all the same.
_NO_PROPORTION = ("perplexity", "bits_per_byte")


def is_proportion(metric: str, value: float | None) -> bool:
    """Whether a metric's value reads best as a percentage."""
    if value is None or any(word in metric for word in _NO_PROPORTION):
        return False
    return 0.0 <= value <= 1.0


def estimate(value: float | None, low: float | None, high: float | None, *, proportion: bool) -> str:
    """``38.5% [33.9, 43.3]``, or ``12.3 [11.0, 13.9]`` for what is no proportion."""
    if value is None:
        return UNDEFINED
    scale, unit = (100.0, "%") if proportion else (1.0, "")
    return f"{_plain(value * scale)}{unit}{_interval(low, high, scale, '')}"


def difference(delta: float | None, low: float | None, high: float | None, *, proportion: bool) -> str:
    """``-14.0 [-18.1, -9.9]``; a proportion's difference is in percentage points."""
    if delta is None:
        return UNDEFINED
    scale = 100.0 if proportion else 1.0
    return f"{_signed(delta * scale)}{_interval(low, high, scale, '+')}"


def percent(value: float | None) -> str:
    return UNDEFINED if value is None else f"{_plain(value * 100)}%"


def ratio(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2f}x"


def rate(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:,.1f}"


def p_value(value: float | None) -> str:
    if value is None:
        return UNDEFINED
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def count(value: int | None) -> str:
    return UNDEFINED if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds is None:
        return UNDEFINED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(octets: int) -> str:
    """``93 MB``, ``1.2 GB``."""
    return f"{octets / 1e9:.1f} GB" if octets >= 1e9 else f"{octets / 1e6:.0f} MB"


def _interval(low: float | None, high: float | None, scale: float, sign: str) -> str:
    if low is None or high is None:
        return ""
    show = _signed if sign else _plain
    return f" [{show(low * scale)}, {show(high * scale)}]"


def _plain(value: float) -> str:
    return f"{value + 0.0:,.1f}"


def _signed(value: float) -> str:
    text = f"{value:+,.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
