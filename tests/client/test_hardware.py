from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from talkoot.client.caps import Caps
from talkoot.client.hardware import (
    cgroup_limit,
    device_users_in_child,
    measure_in_child,
    users_by_nvml,
)
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
    assert [(user["pid"], user["bytes"]) for user in users] == [(other, 2**30), (2**22 + 1, None)]
    assert users[0]["name"]
    assert users[1]["name"] == "unknown"
    assert driver.calls == ["init", "GPU-1", "shutdown"]


def test_without_nvml_nothing_is_said_of_who_uses_the_device() -> None:
    assert device_users_in_child("cpu") == []
