"""Sizes as people write and read them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.limits import GIB, KIB, MIB

_UNITS: Final[Mapping[str, int]] = {
    **{"": 1, "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB},
    **{"t": 1024 * GIB, "tib": 1024 * GIB},
    **{"kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4},
}
_SIZE: Final = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]{0,3})\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes in ``"20GiB"``, ``"1.5 g"`` (binary) or ``"20GB"`` (decimal).

    Raises:
        ConfigError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(
            f"{text[:40]!r} is not a size: write a number and a unit, such as 20GiB or 500MB.",
            code="bad-size",
        )
    whole, _, fraction = match[1].partition(".")
    unit = _UNITS[match[2].lower()]
    return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def format_size(size_bytes: int) -> str:
    """``1536`` as ``"1.5 KiB"``: three significant digits, binary units."""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    unit = units.pop(0)
    while units and abs(value) >= 999.5:  # not 1024: "1010 MiB" takes four digits
        value, unit = value / 1024, units.pop(0)
    digits = 0 if unit == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"
