"""Numbers as people read them, and text that is safe on a terminal. Pure."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

_BARS = "▁▂▃▄▅▆▇█"


def _scaled(value: float, units: Sequence[str]) -> str:
    unit = 0
    # 999.5 would be printed as 1000
    while abs(value) >= 999.5 and unit < len(units) - 1:
        value /= 1000
        unit += 1
    if unit == 0:
        return f"{value:.0f}{units[0]}"
    return f"{value:.{_decimals(value)}f}{units[unit]}"


def _decimals(value: float) -> int:
    """Decimals that give three significant digits, at most two."""
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0


def bytes_text(value: float | None) -> str:
    """Bytes in decimal units, three digits: ``1.23 MB``; a dash for what is not known."""
    return "–" if value is None else _scaled(value, (" B", " kB", " MB", " GB", " TB", " PB"))


def count_text(value: float | None) -> str:
    """A count, three digits: ``4.12 M``; a dash for what is not known."""
    return "–" if value is None else _scaled(value, ("", " k", " M", " B", " T"))


def seconds_text(value: float | None) -> str:
    """A duration in seconds: ``4.2 s``, ``3 min 05 s``, ``2 h 07 min``, ``12 days``."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 59.95:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 100:
        return f"{hours} h {minutes:02d} min"
    days = value / 86_400
    return f"{days:.0f} days" if days < 1000 else f"{days / 365.25:,.0f} years"


def many(count: int, noun: str) -> str:
    """A count and its noun: ``1 node``, ``4 nodes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def loss_text(value: float | None) -> str:
    """A loss in nats per token, three decimals; a dash for what is not known."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def number_text(value: float) -> str:
    """A figure of any size, about four digits: ``0.7643``, ``4.821``, ``19,410``, ``986 M``."""
    if abs(value) >= 1e5:
        return count_text(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def times_smaller_text(dense: float, sent: float) -> str:
    """How much smaller ``sent`` is than ``dense``, both in bytes: ``×217``."""
    if dense <= 0 or sent <= 0:
        return "–"
    ratio = dense / sent
    return f"×{ratio:.{_decimals(ratio)}f}" if ratio < 99.95 else f"×{ratio:,.0f}"


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` block characters, lowest to highest.

    More values than characters are averaged in equal stretches; values that are not finite, or
    beyond anything that could be a loss, are left out.
    """
    finite = [value for value in values if math.isfinite(value) and abs(value) < 1e100]
    if not finite or width < 1:
        return ""
    if len(finite) > width:
        edges = [len(finite) * i // width for i in range(width + 1)]
        finite = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(finite), max(finite)
    if high == low:
        return _BARS[3] * len(finite)
    top = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / (high - low) * top)] for value in finite)


def clean(text: object, *, cap: int = 400) -> str:
    """``text`` on one line, without what could move a cursor or turn the writing direction.

    Names and sentences come from other people's machines.
    """
    line = "".join(
        " " if char in "\n\r\t" else char
        for char in str(text)[:cap]
        if char in "\n\r\t" or unicodedata.category(char)[0] != "C"
    )
    return " ".join(line.split())
