from __future__ import annotations

from pathlib import Path

import pytest

from talkoot.client.caps import Caps
from talkoot.client.hardware import cgroup_limit, measure_in_child
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
