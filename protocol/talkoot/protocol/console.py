"""What the three command lines share: errors as one sentence, durations, sizes."""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Callable
from pathlib import Path

from talkoot.protocol.errors import ConfigError, TalkootError
from talkoot.protocol.files import FULL_ERRNOS, READ_ONLY_ERRNOS, explain_os_error

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def run(app: Callable[[], object]) -> None:
    """Run a command line: a :class:`TalkootError` becomes one sentence and exit status 1.

    So does a disk that is full or read-only, wherever it is met.
    """
    try:
        app()
    except TalkootError as err:
        print(f"error: {err.sentence}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)  # the reader (head, less) has gone
    except OSError as err:
        if err.errno not in FULL_ERRNOS | READ_ONLY_ERRNOS:
            raise
        known = explain_os_error(err, "", Path(err.filename or "."))
        print(f"error: {known.sentence}", file=sys.stderr)
        sys.exit(1)


def parse_duration(text: str) -> float:
    """``90s``, ``15m``, ``12h``, ``7d``, ``2w`` in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{text!r} is not a duration: write it like 90s, 15m, 12h, 7d or 2w.")
    return float(match[1]) * _UNITS[match[2]]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def format_count(value: float) -> str:
    """A count for people: ``1.2 M``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
