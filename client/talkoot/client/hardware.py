"""What this machine has, measured rather than believed.

torch is asked in a child process (``python -m talkoot.client.hardware``), so that the daemon never
imports it and a driver that crashes takes nobody along. The device is whatever
``torch.accelerator`` finds; none is named here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from talkoot.client.caps import Caps, add_arguments, told
from talkoot.client.neighbours import device_users
from talkoot.protocol.errors import CapacityError, TalkootError
from talkoot.protocol.files import bytes_below
from talkoot.protocol.messages import Capability, canonical_bytes, parse

CHILD_SECONDS = 120.0
"""A cold import of torch from a slow disk takes most of a minute."""
_UNLIMITED = 2**60
"""cgroup v1 writes "no limit" as a number just below 2**63."""
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() else None


def _cgroup_directories(root: Path, membership: str) -> list[tuple[Path, str, str]]:
    """``(directory, limit file, usage file)`` of this process's memory cgroup and its ancestors."""
    found = []
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # v2: one hierarchy; beside v1 it is mounted under "unified"
            bases = [root, root / "unified"]
            names = ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            bases = [root / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        relative = Path(path.lstrip("/"))
        for base in bases:
            # A limit holds for all below it, so each ancestor counts. In a container the path may
            # be the host's and not exist here; the mount's root is then this container's cgroup.
            for part in [relative, *relative.parents]:
                found.append((base / part, *names))
    return found


def cgroup_limit(
    root: Path = _CGROUP_ROOT, membership: str | None = None
) -> tuple[int, int] | None:
    """``(limit, free)`` bytes of the tightest memory cgroup (v1 or v2) around us, if any."""
    if membership is None:
        try:
            membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        except OSError:
            return None
    tightest: tuple[int, int] | None = None
    for directory, limit_name, usage_name in _cgroup_directories(root, membership):
        limit = _read_number(directory / limit_name)
        if limit is None or limit >= _UNLIMITED:
            continue
        free = max(limit - (_read_number(directory / usage_name) or 0), 0)
        if tightest is None or limit < tightest[0]:
            tightest = (limit, free)
    return tightest


def host_memory(max_ram: int | None) -> tuple[int, int]:
    """``(total, free)`` bytes of host memory under the cgroup's limit and the volunteer's cap."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit = cgroup_limit()
    if limit is not None:
        total, free = min(total, limit[0]), min(free, limit[1])
    return _capped(total, free, max_ram)


def _capped(total: int, free: int, cap: int | None) -> tuple[int, int]:
    """A cap counts as the size of the machine: what is over it does not exist."""
    if cap is None:
        return total, min(free, total)
    return min(total, cap), min(free, total, cap)


def _talkoot_version() -> str:
    try:
        return version("talkoot")
    except PackageNotFoundError:
        return "unknown"


def _usable_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def disk_room(home: Path | None, max_disk: int | None) -> tuple[int, int]:
    """Bytes of disk that a node's files may take, and without the volunteer's cap: what is free
    and what they take already. ``home`` need not be there yet; None: the working directory's disk.
    """
    held = 0 if home is None else bytes_below(home)
    place = (home or Path.cwd()).absolute()
    while not place.exists():
        place = place.parent
    physical = shutil.disk_usage(place).free + held
    return (physical if max_disk is None else min(physical, max_disk)), physical


def measure(device: str | None, caps: Caps, home: Path | None = None) -> Capability:
    """Measure this machine, in this process. Imports torch.

    Args:
        device: a torch device name; ``None`` takes the accelerator if one works, else the CPU.
        caps: the volunteer's.
        home: the node's directory, whose disk is measured.

    Raises:
        CapacityError: the device asked for is not there.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        chosen = accelerator or torch.device("cpu")
    else:
        try:
            chosen = torch.device(device)
        except RuntimeError as err:
            raise CapacityError(
                f"torch knows no device named {device!r}: use cpu, cuda, mps or xpu.",
                code="no-device",
            ) from err
    host_physical, _ = host_memory(None)
    host_total, host_free = host_memory(caps.ram)
    if chosen.type == "cpu":
        name = _cpu_name()
        physical, total, free = host_physical, host_total, host_free
    elif accelerator is None or accelerator.type != chosen.type:
        there = accelerator.type if accelerator is not None else "none"
        raise CapacityError(
            f"There is no working {chosen.type} device on this machine (accelerator found: "
            f"{there}): choose another device or install a torch build that has it.",
            code="no-device",
        )
    else:
        name = _accelerator_name(torch.get_device_module(chosen), chosen)
        raw_free, raw_total = torch.accelerator.get_memory_info(chosen)
        physical = int(raw_total)
        total, free = _capped(physical, int(raw_free), caps.vram)
    module = None if chosen.type == "cpu" else torch.get_device_module(chosen)
    disk, disk_physical = disk_room(home, caps.disk)
    return Capability(
        device=chosen.type,
        device_name=name[:128],
        device_total_bytes=total,
        device_free_bytes=free,
        host_total_bytes=host_total,
        host_free_bytes=host_free,
        disk_free_bytes=disk,
        cpu_count=_usable_cpus(),
        torch_version=str(torch.__version__)[:64],
        talkoot_version=_talkoot_version()[:64],
        device_physical_bytes=physical,
        host_physical_bytes=host_physical,
        disk_physical_bytes=disk_physical,
        compute_capability=_compute_capability(module, chosen)[:32],
        bf16=_has_bf16(module),
        driver=_driver(module)[:64],
    )


def _ask(module: object, name: str, *arguments: object) -> object:
    """What a device module says, or None where it does not know the question."""
    question = getattr(module, name, None)
    if not callable(question):
        return None
    try:
        return question(*arguments)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        return None


def _compute_capability(module: object, device: object) -> str:
    """``9.0`` of CUDA, the architecture's name of ROCm."""
    properties = _ask(module, "get_device_properties", device)
    name = getattr(properties, "gcnArchName", None)
    if name:
        return str(name)
    version = _ask(module, "get_device_capability", device)
    return ".".join(map(str, version)) if isinstance(version, tuple) else ""


def _has_bf16(module: object) -> bool:
    """Whether the device computes in bf16. Where nobody can say, it is tried: the proof tells."""
    return module is None or _ask(module, "is_bf16_supported") is not False


def _driver(module: object) -> str:
    """The driver's version, from NVML where nvidia-ml-py is installed (extra ``gpu``)."""
    if getattr(module, "__name__", "") != "torch.cuda":
        return ""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001 - not installed, or a driver that is broken in its own way
        return ""


def _accelerator_name(module: object, device: object) -> str:
    get_name = getattr(module, "get_device_name", None)
    return str(get_name(device)) if callable(get_name) else str(device)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() or "cpu"
    except OSError:
        pass
    return "cpu"


def measure_in_child(
    device: str | None = None,
    caps: Caps | None = None,
    home: Path | None = None,
    *,
    timeout_seconds: float = CHILD_SECONDS,
) -> Capability:
    """:func:`measure` in a child process; this process imports no torch.

    Raises:
        CapacityError: the device is not there, or torch cannot start on this machine.
    """
    command = [sys.executable, "-m", "talkoot.client.hardware"]
    if device is not None:
        command += ["--device", device]
    command += (caps or Caps()).as_arguments()
    if home is not None:
        command += ["--home", str(home)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise CapacityError(
            f"This machine could not be measured ({err}): try again when it is less busy.",
            code="not-measured",
        ) from err
    lines = done.stdout.splitlines()
    answer = lines[-1] if lines else b""
    if done.returncode == 0:
        return parse(Capability, answer)
    try:
        refusal = json.loads(answer)
        sentence, code = str(refusal["sentence"]), str(refusal["code"])
    except (ValueError, KeyError, TypeError):
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = reason[-1] if reason else f"exit status {done.returncode}"
        raise CapacityError(
            f"This machine could not be measured because torch does not start ({why[:300]}): "
            "install talkoot's dependencies again.",
            code="not-measured",
        ) from None
    raise CapacityError(sentence, code=code)


def main(arguments: list[str] | None = None) -> int:
    """Print one line of JSON: a Capability, or ``{"code", "sentence"}`` with exit status 1."""
    parser = argparse.ArgumentParser(prog="talkoot.client.hardware")
    parser.add_argument("--device")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--users", action="store_true", help="who else uses the device")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.users:
        print(json.dumps([vars(user) for user in device_users(options.device)]))
        return 0
    try:
        capability = measure(options.device, told(options), options.home)
    except TalkootError as err:
        print(json.dumps({"code": err.code, "sentence": err.sentence}))
        return 1
    print(canonical_bytes(capability).decode("ascii"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
