"""Run a function in a process of its own and watch its memory: ``run_child("bench.x:f", {...})``.

Memory is the process's anonymous memory (``RssAnon``) and its whole resident set (``VmRSS``, pages
mapped from files included), from ``/proc/PID/status`` every few milliseconds. The page cache that
reads and writes fill belongs to the kernel and is in neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.004
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ChildResult:
    """What a child did and took."""

    result: Any
    """What the function returned, by way of JSON."""
    peak_anonymous: int
    """Bytes."""
    peak_resident: int
    """Bytes, mapped files included."""
    base_anonymous: int
    """Bytes after the function's module was imported and before the function was called."""
    seconds: float
    """Of the function alone."""


def memory_of(pid: int) -> tuple[int, int]:
    """(anonymous, resident) bytes of a process now; zeros when it is gone."""
    anonymous = resident = 0
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("RssAnon:"):
                    anonymous = int(line.split()[1]) * 1024
                elif line.startswith("VmRSS:"):
                    resident = int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return anonymous, resident


def run_child(
    target: str,
    arguments: Mapping[str, Any],
    *,
    threads: int = 1,
    timeout: float = 3600,
) -> ChildResult:
    """Call ``module:function(**arguments)`` in a new Python; arguments and result are JSON.

    Raises :class:`RuntimeError` with the end of its output when it fails.
    """
    read, write = os.pipe()
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    command = [sys.executable, "-m", "bench.child", target, json.dumps(dict(arguments)), str(write)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        pass_fds=[write],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.close(write)
    anonymous = resident = 0
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None:
            a, r = memory_of(process.pid)
            anonymous, resident = max(anonymous, a), max(resident, r)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{target} took more than {timeout:.0f} s")
            time.sleep(POLL_SECONDS)
        with os.fdopen(read) as file:
            text = file.read()
        output = process.stdout.read().decode(errors="replace") if process.stdout else ""
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
    if process.returncode != 0 or not text:
        raise RuntimeError(f"{target} failed ({process.returncode}):\n{output[-4000:]}")
    answer = json.loads(text)
    return ChildResult(
        answer["result"], anonymous, resident, answer["base_anonymous"], answer["seconds"]
    )


def main() -> None:
    """The child's side."""
    target, arguments, fd = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    module, name = target.split(":")
    function = getattr(import_module(module), name)
    base, _ = memory_of(os.getpid())
    began = time.perf_counter()
    result = function(**arguments)
    seconds = time.perf_counter() - began
    with os.fdopen(fd, "w") as file:
        json.dump({"result": result, "seconds": seconds, "base_anonymous": base}, file)


if __name__ == "__main__":
    main()
