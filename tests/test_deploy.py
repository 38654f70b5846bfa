"""The service units: systemd takes them, they are hardened, and what they run exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.test_docs import complaint

ROOT = Path(__file__).resolve().parent.parent
UNITS = sorted((ROOT / "deploy" / "systemd").rglob("*.*"))
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
MOST_EXPOSED = {"system": 20, "user": 70}
"""Tenths of what ``systemd-analyze security`` says, from 0 (safe) to 100."""
INSTALLED = re.compile(r"(?:/opt/talkoot|%h/talkoot)/\.venv/bin/")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not installed: apt-get install systemd",
)


def name_of(unit: Path) -> str:
    return str(unit.relative_to(ROOT / "deploy"))


def installed(unit: Path, tmp_path: Path) -> Path:
    """The unit as it would be here: with the programs of this environment."""
    here = f"{Path(sys.executable).parent}/"
    made = tmp_path / unit.name
    made.write_text(INSTALLED.sub(here, unit.read_text("utf-8")))
    return made


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=name_of)
def test_systemd_finds_no_fault_with(unit: Path, tmp_path: Path) -> None:
    for other in UNITS:  # a timer wants its service
        if other.parent == unit.parent:
            installed(other, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "talkoot" in line]
    assert ours == []


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES, ids=name_of)
def test_a_service_is_exposed_no_more_than_its_kind_has_to_be(unit: Path, tmp_path: Path) -> None:
    most = MOST_EXPOSED["user" if unit.parent.name == "user" else "system"]
    done = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--no-pager"),
            *(f"--threshold={most}", str(installed(unit, tmp_path))),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1:]


@pytest.mark.parametrize("unit", SERVICES, ids=name_of)
def test_a_service_runs_unprivileged_in_a_directory_of_its_own(unit: Path) -> None:
    said = dict(re.findall(r"^([A-Za-z]+)=(.*)$", unit.read_text("utf-8"), re.MULTILINE))
    assert said["NoNewPrivileges"] == "yes"
    assert said["UMask"] == "0077"
    assert "@system-service" in unit.read_text("utf-8")
    if unit.parent.name == "user":
        return
    assert said.get("User") == "talkoot" or said.get("DynamicUser") == "yes"
    assert said["CapabilityBoundingSet"] == ""
    assert (said["ProtectSystem"], said["ProtectHome"], said["PrivateTmp"]) == (
        "strict",
        "yes",
        "yes",
    )
    assert said["StateDirectoryMode"] == "0700"


@pytest.mark.parametrize("unit", SERVICES, ids=name_of)
def test_what_a_service_runs_exists_with_its_options_and_carries_no_secret(unit: Path) -> None:
    text = unit.read_text("utf-8")
    commands = re.findall(
        r"/bin/(talkoot[a-z-]* [^;<'\n]*)",
        "".join(re.findall(r"^ExecStart=.*$", text, re.MULTILINE)),
    )
    assert commands
    plain = [re.sub(r" - *$", "", command.strip()) for command in commands]
    assert [problem for command in plain if (problem := complaint(command))] == []
    assert not re.search(r"token=|password|://[^/ ]*:[^/ ]*@", text)
