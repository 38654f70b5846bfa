"""An invite on the command line is not there for all to read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
from talkoot.client.argv import hide
print(hide(sys.argv[1]))
print(Path("/proc/self/cmdline").read_bytes().hex(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_secret_argument_is_gone_for_everybody_who_lists_processes() -> None:
    secret = "https://host:7443/join#ca=00&token=secret-ü"
    with subprocess.Popen(
        [sys.executable, "-c", CODE, secret, "--name", "ada", secret],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        seen = bytes.fromhex(process.stdout.readline())
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes() == seen
        process.communicate()
    assert b"secret" not in seen
    assert seen.endswith(b"\0--name\0ada\0" + b"x" * len(secret.encode()) + b"\0")


def test_nothing_to_hide_is_no_error() -> None:
    from talkoot.client.argv import hide

    assert not hide("")
    assert hide("this is on no command line, whatever pytest was given")
