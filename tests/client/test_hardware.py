from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from talkoot.client.caps import Caps
from talkoot.client.hardware import cgroup_limit, measure_in_child
from talkoot.client.neighbours import device_users_in_child, holders, host_users, users_by_nvml
from talkoot.protocol.errors import CapacityError

CAP = 2 * 2**30


def test_a_child_measures_this_machine_under_the_cap(tmp_path: Path) -> None:
    capability = measure_in_child("cpu", Caps(ram=CAP), tmp_path)
    assert capability.device == "cpu"
    assert capability.device_name
    assert capability.device_total_bytes == capability.host_total_bytes == CAP
    assert 0 < capability.host_free_bytes <= CAP
    assert 0 < capability.device_free_bytes <= CAP
    assert capability.disk_free_bytes > 0
    assert capability.cpu_count >= 1
    assert capability.torch_version[0].isdigit()


def test_a_device_that_is_not_there_is_refused_in_one_sentence() -> None:
    with pytest.raises(CapacityError) as refused:
        measure_in_child("nonsense")
    assert refused.value.code == "no-device"
    assert "nonsense" in refused.value.sentence


def write(root: Path, directory: str, **files: str) -> None:
    (root / directory).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / directory / name.replace("__", ".")).write_text(text + "\n")


def test_the_tightest_cgroup_v2_limit_of_all_ancestors_holds(tmp_path: Path) -> None:
    write(tmp_path, "a", memory__max=str(CAP), memory__current=str(CAP // 4))
    write(tmp_path, "a/b", memory__max="max", memory__current="0")
    assert cgroup_limit(tmp_path, "0::/a/b\n") == (CAP, CAP - CAP // 4)


def test_a_cgroup_v1_limit_is_found_beside_v2(tmp_path: Path) -> None:
    write(tmp_path, "memory", **{"memory__limit_in_bytes": str(2**63 - 4096)})
    write(
        tmp_path,
        "memory/job",
        **{"memory__limit_in_bytes": str(CAP), "memory__usage_in_bytes": str(2 * CAP)},
    )
    assert cgroup_limit(tmp_path, "9:cpu:/\n4:memory:/job\n0::/\n") == (CAP, 0)


def test_in_a_container_the_mounts_root_is_the_cgroup(tmp_path: Path) -> None:
    write(tmp_path, ".", memory__max=str(CAP), memory__current="0")
    assert cgroup_limit(tmp_path, "0::/host/path/not/visible\n") == (CAP, CAP)


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path, "0::/\n") is None
    assert cgroup_limit(tmp_path, "garbage") is None


def driver_that_sees(pid: int) -> SimpleNamespace:
    """What NVML says on a machine with a GPU, in its own words: there is none here."""
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)
    other = SimpleNamespace(pid=pid, usedGpuMemory=2**30)
    gone = SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None)
    calls: list[str] = []
    return SimpleNamespace(
        calls=calls,
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetHandleByUUID=calls.append,
        nvmlDeviceGetComputeRunningProcesses=lambda _handle: [mine, other],
        nvmlDeviceGetGraphicsRunningProcesses=lambda _handle: [gone, other],
    )


def test_who_else_uses_a_device_is_told_once_and_most_first() -> None:
    other = os.getppid()
    driver = driver_that_sees(other)
    users = users_by_nvml(driver, "GPU-1")
    assert [(user.pid, user.bytes) for user in users] == [(other, 2**30), (2**22 + 1, None)]
    assert users[0].name
    assert users[1].name == "unknown"
    assert driver.calls == ["init", "GPU-1", "shutdown"]


def test_without_nvml_nothing_is_said_of_who_uses_the_device() -> None:
    assert device_users_in_child("cpu") == []


def test_a_program_that_holds_host_memory_is_told_by_its_name() -> None:
    hold = (
        "import os, sys\n"
        "if os.fork(): os._exit(0)\n"  # what this node started would not be somebody else's
        "held = b'x' * (300 * 2**20)\n"
        "print(os.getpid(), flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as gone:
        assert gone.stdout is not None
        name = psutil.Process(int(gone.stdout.readline())).name()
        assert gone.wait(30) == 0
        held = {user.name: user.bytes or 0 for user in host_users()}
        assert gone.stdin is not None
        gone.stdin.close()
    assert held[name] >= 300 * 2**20


def test_what_this_node_started_is_not_somebody_else() -> None:
    hold = "held = b'x' * (300 * 2**20); print(flush=True); input()"
    before = {user.name: user.bytes or 0 for user in host_users()}
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        name = psutil.Process(child.pid).name()
        after = {user.name: user.bytes or 0 for user in host_users()}
        child.kill()
    assert after.get(name, 0) < before.get(name, 0) + 300 * 2**20


def test_without_an_accelerator_host_memory_is_the_devices() -> None:
    found = holders("cpu")
    assert found.device == found.host
