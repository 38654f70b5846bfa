"""The volunteer's command line as a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from talkoot.client.cli import app
from talkoot.protocol.invite import Invite
from talkoot.sims.local import BIN, environment

COMMANDS = ("join", "status", "pause", "resume", "leave", "doctor")


def talkoot(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "talkoot"), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )


def refused(*arguments: str) -> str:
    """Run what must fail; returns its one sentence."""
    done = talkoot(*arguments)
    assert done.returncode == 1, done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def joined(home: Path) -> Path:
    """A home that looks as if a node lived there."""
    home.mkdir()
    (home / "enrolment.json").write_text("{}")
    return home


def test_there_are_the_six_commands_and_no_other() -> None:
    assert {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    } == set(COMMANDS)


def test_the_help_of_every_command_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from talkoot.client.cli import app\n"
        f"for name in {COMMANDS!r}:\n"
        "    done = CliRunner().invoke(app, [name, '--help'])\n"
        "    assert done.exit_code == 0, done.output\n"
        "    assert 'Usage' in done.output and '--home' in done.output\n"
        "print([m for m in ('torch', 'flwr', 'grpc', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", ["status", "pause", "resume", "leave"])
def test_a_command_for_a_node_that_is_not_there_says_how_to_join(home: Path, command: str) -> None:
    sentence = refused(command, "--home", str(home))
    assert "No node lives at" in sentence
    assert "talkoot join" in sentence
    assert not (home / "pause").exists()


def test_joining_without_an_invite_asks_for_one(home: Path) -> None:
    assert "invite URL" in refused("join", "--home", str(home))


def test_joining_with_what_is_no_invite_says_so_and_leaves_no_key(home: Path) -> None:
    sentence = refused("join", "https://example.org/", "--home", str(home))
    assert "invite" in sentence
    assert not (home / "identity.pem").exists()


def test_joining_where_nobody_answers_says_so_and_leaves_no_key(home: Path) -> None:
    invite = Invite(host="127.0.0.1", port=1, ca_fingerprint="0" * 64, token="t" * 32)
    sentence = refused("join", invite.url(), "--home", str(home))
    assert "No coordinator answers at 127.0.0.1:1" in sentence
    assert not (home / "identity.pem").exists()


def test_sizes_that_are_none_are_refused(home: Path) -> None:
    assert "12 parsecs" in refused("join", "--max-ram", "12 parsecs", "--home", str(home))


def test_pause_and_resume_are_a_file_that_comes_and_goes(joined: Path) -> None:
    for _ in range(2):
        assert talkoot("pause", "--home", str(joined)).returncode == 0
        assert (joined / "pause").exists()
    for _ in range(2):
        assert talkoot("resume", "--home", str(joined)).returncode == 0
        assert not (joined / "pause").exists()


def _status(home: Path, **changes: Any) -> None:
    document: dict[str, Any] = {
        "pid": os.getpid(),
        "unix": time.time(),
        "name": "ada",
        "node_id": "0123456789abcdef",
        "coordinator": "host:7443",
        "reachable": True,
        "status": "admitted",
        "state": "training",
        "version": 3,
        "step": 5,
        "steps": 9,
        "loss": None,
        "tokens_per_second": 1234.5,
        "bytes_up": 5_000_000,
        "bytes_down": 0,
        "contributions": 2,
        "healed": 0,
        "trainer_pid": None,
        "last": "Round 2: accepted.",
    }
    (home / "status.json").write_text(json.dumps(document | changes))


def test_status_is_for_people_and_with_json_for_scripts(joined: Path) -> None:
    _status(joined)
    told = talkoot("status", "--home", str(joined)).stdout
    assert "ada (0123456789abcdef): training" in told
    assert "step 5/9" in told
    assert "Round 2: accepted." in told
    document = json.loads(talkoot("status", "--home", str(joined), "--json").stdout)
    assert (document["state"], document["version"]) == ("training", 3)
    _status(joined, version=None, step=0, steps=0)
    assert "no work yet since it started" in talkoot("status", "--home", str(joined)).stdout


@pytest.mark.parametrize("ago", [3600.0, -3600.0], ids=["an hour old", "clock set back since"])
def test_a_daemon_that_died_is_not_shown_as_running(joined: Path, ago: float) -> None:
    _status(joined, unix=time.time() - ago)
    document = json.loads(talkoot("status", "--home", str(joined), "--json").stdout)
    assert document["state"] == "not running"


def test_status_of_a_node_that_never_ran_is_an_answer_and_no_error(joined: Path) -> None:
    assert "never started" in talkoot("status", "--home", str(joined)).stdout
    (joined / "status.json").write_text("{")  # a crash of something else
    assert "never started" in talkoot("status", "--home", str(joined)).stdout


def test_the_doctor_refuses_a_model_that_it_does_not_know(home: Path) -> None:
    assert "gigantic" in refused("doctor", "--home", str(home), "--model", "gigantic")


def test_the_doctor_says_that_7b_does_not_fit_into_a_gibibyte(home: Path) -> None:
    arguments = ("--home", str(home), "--device", "cpu", "--max-ram", "1GiB", "--json")
    done = talkoot("doctor", "--model", "llama-2-7b", *arguments)
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)
    assert findings["fits"] is False
    assert findings["capability"]["device_total_bytes"] <= 2**30
    needs = {row["recipe"]: row["device_bytes"] for row in findings["recipes"]}
    assert needs["fp32-adamw"] > 100e9
    assert len(findings["ways_to_fit"]) == 3
