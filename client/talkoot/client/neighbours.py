"""Which other programs hold the memory that a replica would need: for the machine's owner only.

What is found here is shown on this machine and sent to nobody.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from typing import Any, Final

from talkoot.protocol.planner.choose import Holder, Holders
from talkoot.protocol.refusals import printable

CHILD_SECONDS: Final = 120.0
MAX_USERS: Final = 16
MIN_BYTES: Final = 100 * 2**20
"""Of a program in host memory: closing a smaller one helps nobody."""


def holders(device: str) -> Holders:
    """Who holds device and host memory, as far as this machine tells."""
    host = host_users()
    if device == "cpu":
        return Holders(device=host, host=host)
    return Holders(device=tuple(device_users_in_child(device)), host=host)


def host_users() -> tuple[Holder, ...]:
    """This user's other programs by what each has of host memory for itself, most first.

    Processes of one name count as one program, as people see them; this node's own do not count.
    """
    import psutil

    me = psutil.Process()
    mine = {me.pid, *(other.pid for other in [*me.parents(), *me.children(recursive=True)])}
    held: dict[str, int] = defaultdict(int)
    pids: dict[str, int] = {}
    for process in psutil.process_iter(["pid", "name", "uids", "memory_info"]):
        seen = process.info
        memory = seen["memory_info"]
        if memory is None or seen["pid"] in mine or not _is_ours(seen["uids"]):
            continue
        name = _clean(seen["name"])
        held[name] += max(memory.rss - getattr(memory, "shared", 0), 0)
        pids.setdefault(name, seen["pid"])
    found = [Holder(name, pids[name], size) for name, size in held.items() if size >= MIN_BYTES]
    return tuple(sorted(found, key=lambda holder: -(holder.bytes or 0))[:MAX_USERS])


def _is_ours(uids: Any) -> bool:
    """Whether its owner may close it; where there are no such numbers, psutil shows what it may."""
    return uids is None or uids.real == os.getuid()


def _clean(name: str | None) -> str:
    return printable(name or "")[:64] or "unknown"


def device_users(device: str | None) -> list[Holder]:
    """Who else has memory of a CUDA device, by NVML, most first. Imports torch.

    Empty where there is no NVML.
    """
    import torch

    try:
        chosen = torch.device(device or "cuda")
        if chosen.type != "cuda" or not torch.cuda.is_available():
            return []
        import pynvml

        uuid = str(torch.cuda.get_device_properties(chosen).uuid).removeprefix("GPU-")
        return users_by_nvml(pynvml, f"GPU-{uuid}")
    except Exception:  # noqa: BLE001 - not installed, or a driver that is broken in its own way
        return []


def users_by_nvml(nvml: Any, uuid: str) -> list[Holder]:
    """The processes on the device with a UUID, this one left out.

    ``nvml``: the module ``pynvml``. A size is None where the driver does not tell (WDDM, MIG).
    """
    nvml.nvmlInit()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        running = [
            *nvml.nvmlDeviceGetComputeRunningProcesses(handle),
            *nvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
        ]
    finally:
        nvml.nvmlShutdown()
    users = {}
    for process in running:  # one that computes and draws is in both lists
        if process.pid != os.getpid():
            size = process.usedGpuMemory
            users[process.pid] = Holder(
                _process_name(process.pid), process.pid, None if size is None else int(size)
            )
    return sorted(users.values(), key=lambda user: -(user.bytes or 0))[:MAX_USERS]


def _process_name(pid: int) -> str:
    import psutil

    try:
        return _clean(psutil.Process(pid).name())
    except psutil.Error:
        return "unknown"  # another user's, or gone


def device_users_in_child(device: str | None) -> list[Holder]:
    """:func:`device_users` in a child process; empty where nothing can be said."""
    command = [sys.executable, "-m", "talkoot.client.hardware", "--users"]
    command += [] if device is None else ["--device", device]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CHILD_SECONDS, check=False)
        return [Holder(**user) for user in json.loads(done.stdout.splitlines()[-1])]
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError, TypeError):
        return []
