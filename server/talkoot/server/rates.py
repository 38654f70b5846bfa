"""How often somebody may ask: token buckets, and what counts as one household."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final

MAX_KEYS: Final = 4096
"""Recent keys that a limiter remembers."""


class RateLimiter:
    """A token bucket per key, for at most :data:`MAX_KEYS` recent keys.

    Args:
        burst: how many may pass at once.
        per_second: how fast the right to pass comes back.
    """

    def __init__(self, burst: float, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allow(self, key: str, now: float) -> bool:
        """Whether ``key`` may pass at ``now`` (monotonic seconds)."""
        level, then = self._buckets.pop(key, (self._burst, now))
        level = min(self._burst, level + max(0.0, now - then) * self._per_second)
        passes = level >= 1.0
        self._buckets[key] = (level - 1.0 if passes else level, now)
        if len(self._buckets) > MAX_KEYS:
            self._buckets.popitem(last=False)
        return passes


def rate_key(address: str) -> str:
    """An IPv4 address, or an IPv6 address's /64: what one household gets."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        mapped = ip.ipv4_mapped
        return str(mapped or ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))
    return str(ip)
