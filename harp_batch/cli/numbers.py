"""Numbers as people read them; ``None`` is always ``-``."""

from __future__ import annotations

import re

from harp_batch.cli.output import UNDEFINED

# f1 is not among them: some tasks of lm-eval give it from 0 to 1, SQuAD 2 from 0 to 100.
_PROPORTION = re.compile(r"acc(uracy)?(_.*)?|.*_acc|exact_match(_.*)?|em|mc[12]|pass@\d+")


def is_proportion(metric: str) -> bool:
    """Whether a metric is known to be a share of the documents, which reads best as a percentage."""
    return _PROPORTION.fullmatch(metric) is not None


def estimate(value: float | None, low: float | None, high: float | None, *, proportion: bool) -> str:
    """``38.5% [33.9, 43.3]``, or ``12.3 [11.0, 13.9]`` and ``0.573`` for what is no proportion."""
    if value is None:
        return UNDEFINED
    scale, unit = (100.0, "%") if proportion else (1.0, "")
    places = _places(value, proportion=proportion)
    return f"{_plain(value * scale, places)}{unit}{_interval(low, high, scale, '', places)}"


def difference(delta: float | None, low: float | None, high: float | None, *, proportion: bool) -> str:
    """``-14.0 [-18.1, -9.9]``; a proportion's difference is in percentage points."""
    if delta is None:
        return UNDEFINED
    scale = 100.0 if proportion else 1.0
    places = _places(delta, proportion=proportion)
    return f"{_signed(delta * scale, places)}{_interval(low, high, scale, '+', places)}"


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


def _places(value: float, *, proportion: bool) -> int:
    """Decimals: one of a percentage and of what is large, three where one would hide the value."""
    return 1 if proportion or abs(value) >= 10 else 3


def _interval(low: float | None, high: float | None, scale: float, sign: str, places: int) -> str:
    if low is None or high is None:
        return ""
    show = _signed if sign else _plain
    return f" [{show(low * scale, places)}, {show(high * scale, places)}]"


def _plain(value: float, places: int = 1) -> str:
    return f"{value + 0.0:,.{places}f}"


def _signed(value: float, places: int) -> str:
    text = f"{value:+,.{places}f}"
    return text if text.strip("+-0.,") else text[1:]
