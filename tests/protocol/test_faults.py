"""Places to die: armed once, they kill once; unarmed, they do nothing; each is where it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from talkoot.protocol import faults

ROOT = Path(__file__).resolve().parents[2]
PASSER = """
import sys
from talkoot.protocol import faults
for name in sys.argv[1:]:
    faults.place(name)
print("alive")
"""


def run(directory: Path | None, *names: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != faults.VARIABLE}
    if directory is not None:
        env[faults.VARIABLE] = str(directory)
    return subprocess.run(
        [sys.executable, "-c", PASSER, *names], env=env, capture_output=True, text=True, check=False
    )


def test_an_armed_place_kills_the_first_that_comes_by_and_nobody_after_it(tmp_path: Path) -> None:
    faults.arm(tmp_path, "push.mid")
    assert faults.hit(tmp_path, "push.mid") is None
    assert run(tmp_path, "open.after-commit").stdout == "alive\n"
    assert run(None, "push.mid").stdout == "alive\n"
    killed = run(tmp_path, "push.mid")
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "")
    assert faults.hit(tmp_path, "push.mid") is not None
    assert run(tmp_path, "push.mid").stdout == "alive\n"
    assert not faults.disarm(tmp_path, "push.mid")


def test_a_place_that_is_taken_back_kills_nobody(tmp_path: Path) -> None:
    faults.arm(tmp_path, "push.mid")
    assert faults.disarm(tmp_path, "push.mid")
    assert run(tmp_path, "push.mid").stdout == "alive\n"
    with pytest.raises(ValueError, match="no place"):
        faults.arm(tmp_path, "push.middle")


def test_each_place_is_in_the_code_once() -> None:
    found: Counter[str] = Counter()
    for side in ("protocol", "client", "server"):
        for file in (ROOT / side / "talkoot").rglob("*.py"):
            found.update(re.findall(r'faults\.place\("([^"]+)"\)', file.read_text("utf-8")))
    assert found == Counter(faults.PLACES)
