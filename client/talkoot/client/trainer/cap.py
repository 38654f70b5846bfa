"""The volunteer's caps on memory, really enforced on this process."""

from __future__ import annotations

import resource

from talkoot.client.caps import Caps
from talkoot.protocol.errors import ConfigError


def enforce(caps: Caps, device: str | None) -> None:
    """Let this process have so much and no more of the memory that its device has.

    On a CPU: of private memory (``RLIMIT_DATA``), Python and libraries included. On an accelerator:
    what torch's allocator may reserve, where it can be told so; there a cap on host memory is
    only counted on.

    Raises:
        ConfigError: on a CPU, it is less than what the process has already.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    kind = torch.device(device).type if device is not None else (found.type if found else "cpu")
    cap = caps.of_device(kind)
    if cap is None:
        return
    if kind != "cpu":
        backend = torch.get_device_module(kind)
        limit = getattr(backend, "set_per_process_memory_fraction", None)
        if limit is not None:
            _, total = torch.accelerator.get_memory_info()
            limit(min(1.0, cap / total))
        return
    held = _data_bytes()
    if cap <= held:
        raise ConfigError(
            f"A memory cap of {cap} bytes is less than the {held} that a trainer takes "
            "before it holds a model: raise --max-ram.",
            code="cap-too-small",
        )
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = cap if hard == resource.RLIM_INFINITY else min(cap, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """What counts against ``RLIMIT_DATA``; 0 where it is not known."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("VmData:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
