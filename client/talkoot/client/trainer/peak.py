"""Peak memory of a piece of work, on whatever device it runs. A torch module."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Final

import psutil
import torch

SAMPLE_SECONDS: Final = 0.002
_MAXRSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024


def _maxrss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


def return_free_memory() -> None:
    """Give freed heap back to the system, so that it is not in the baseline."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


def _begin_high_water() -> bool:
    """Make ``VmHWM`` what is resident now (proc(5)); False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _high_water() > 0
    except OSError:
        return False


def _high_water() -> int:
    """The most that was resident since then, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMeter:
    """Context manager; ``peak_bytes`` afterwards.

    On an accelerator: the most that torch's allocator reserved, all of the process. On the CPU: by
    how much the resident set of the process grew over what it was. Linux keeps that exactly
    (``VmHWM``, begun anew). Elsewhere it is exact (``ru_maxrss``) when the work made the process
    bigger than it had ever been, and otherwise the largest of samples taken every 2 ms.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="peak-sampler", daemon=True)
        self._baseline = 0
        self._exact = False
        self._maxrss_before = 0
        self._sampled = 0
        self.peak_bytes = 0

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled, self._process.memory_info().rss)
            if self._stop.wait(SAMPLE_SECONDS):
                return

    def __enter__(self) -> PeakMeter:
        return_free_memory()
        if self._device.type == "cpu":
            self._baseline = self._process.memory_info().rss
            self._exact = _begin_high_water()
            if not self._exact:
                # Not where it can be helped: under a memory cap that is reached, a thread that
                # finds no memory to begin with would be waited for in vain.
                self._maxrss_before = _maxrss()
                self._sampler.start()
        else:
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats(self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._device.type == "cpu" and self._exact:
            self.peak_bytes = max(_high_water() - self._baseline, 0)
        elif self._device.type == "cpu":
            self._stop.set()
            self._sampler.join()
            highest = _maxrss()
            peak = highest if highest > self._maxrss_before else self._sampled
            self.peak_bytes = max(peak - self._baseline, 0)
        else:
            self.peak_bytes = int(torch.accelerator.max_memory_reserved(self._device))
