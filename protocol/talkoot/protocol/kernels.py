"""Which inner loops the codec runs: NumPy's, or compiled ones with the same results (ADR 27).

Compiling takes some seconds of a core and 80 MB, which a process that codes a small model never
earns back. So it happens once a process has coded much, in the thread that comes to it; others go
on with NumPy meanwhile. Without Numba (the
extra ``compiled``) all stays with NumPy.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

WORTH_IT: Final = 2**30
"""Elements that were encoded, and entries (1/64 of the elements, or 1/16) that were decoded."""

_NAME: Final = "talkoot.protocol.codec_compiled"


class Kernels:
    """What one process knows of it. Thread-safe."""

    def __init__(self, worth_it: int = WORTH_IT) -> None:
        self._left = worth_it
        self._lock = threading.Lock()
        self._module: ModuleType | None = None
        self._decided = False

    def after(self, elements: int) -> ModuleType | None:
        """``codec_compiled``, or None while NumPy is the better choice, for so many more."""
        if self._decided:
            return self._module
        self._left -= elements  # two threads at once may count one of them only: no harm
        if self._left > 0 or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._decide()
        finally:
            self._lock.release()

    def compile(self) -> ModuleType | None:
        """Do not wait until it pays; None without Numba."""
        with self._lock:
            return self._decide()

    @contextmanager
    def running(self, *, compiled: bool) -> Iterator[ModuleType | None]:
        """Loops of one kind, whatever was coded so far: for tests and measurements, by one thread.

        Without Numba it is NumPy's in either case: look at what is given.
        """
        module = self.compile()
        self._module = module if compiled else None
        try:
            yield self._module
        finally:
            self._module = module

    def _decide(self) -> ModuleType | None:
        if not self._decided:
            try:
                self._module = importlib.import_module(_NAME)
            except (ImportError, OSError):  # not installed, or not for this NumPy or this machine
                self._module = None
            self._decided = True
        return self._module


KERNELS: Final = Kernels()
"""This process's."""
