"""The operator's state directory: what may not be served is refused with a way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from talkoot.protocol.errors import StateError, TalkootError
from talkoot.protocol.files import DirectoryLock
from talkoot.server.cli import app
from talkoot.server.config import parse_config
from talkoot.server.coordinator import Coordinator
from talkoot.server.setup import init
from talkoot.server.state import STATE_FORMAT, StateDir


@pytest.fixture
def state(state_template: Path, tmp_path: Path) -> StateDir:
    return StateDir(Path(shutil.copytree(state_template, tmp_path / "state")))


def refusal(state: StateDir) -> StateError:
    with pytest.raises(StateError) as caught:
        Coordinator.open(state.root)
    assert str(state.root) in caught.value.sentence
    assert caught.value.sentence.endswith(".")
    return caught.value


def test_a_finished_directory_opens_and_names_its_run(state: StateDir) -> None:
    coordinator = Coordinator.open(state.root)
    assert coordinator.run_id == state.check()
    assert coordinator.spec.run_id == coordinator.run_id
    coordinator.close()


def test_init_keeps_secrets_from_other_users(state: StateDir) -> None:
    for path in (state.root, state.ca, state.coordinator_key.parent, state.tls, state.incoming):
        assert path.stat().st_mode & 0o077 == 0
    for path in (state.coordinator_key, state.config, state.marker):
        assert path.stat().st_mode & 0o077 == 0


def test_a_directory_that_is_not_there_is_told_how_to_make_it(tmp_path: Path) -> None:
    error = refusal(StateDir(tmp_path / "absent"))
    assert error.code == "missing"
    assert "talkoot-coordinator init" in error.sentence


def test_a_half_made_directory_is_refused_by_serve_and_by_init(state: StateDir) -> None:
    state.marker.unlink()  # written last
    assert refusal(state).code == "half-made"
    with pytest.raises(StateError, match="interrupted") as caught:
        state.create()
    assert caught.value.code == "half-made"
    assert state.config.exists(), "what is there is the operator's to delete"


def test_a_directory_of_a_newer_format_is_left_to_the_talkoot_that_wrote_it(
    state: StateDir,
) -> None:
    state.marker.write_text(json.dumps({"format": STATE_FORMAT + 1, "run_id": "x"}))
    error = refusal(state)
    assert error.code == "newer-schema"
    assert f"format {STATE_FORMAT + 1}" in error.sentence


@pytest.mark.parametrize(
    "marker", [b"", b"[]", b"3", b"\xff", b'{"format": 1}', b'{"format": 1, "run_id": 7}']
)
def test_a_garbled_marker_is_a_sentence_and_no_traceback(state: StateDir, marker: bytes) -> None:
    state.marker.write_bytes(marker)
    assert refusal(state).code == "unreadable"


def test_a_ledger_of_another_run_is_named_as_such(state: StateDir) -> None:
    state.marker.write_text(json.dumps({"format": STATE_FORMAT, "run_id": "another"}))
    error = refusal(state)
    assert error.code == "run-unknown"
    assert "another" in error.sentence


def test_init_never_writes_over_a_finished_directory(state: StateDir) -> None:
    before = state.marker.read_bytes()
    with pytest.raises(StateError, match="already") as caught:
        init(state.root, parse_config('[model]\npreset = "nano"\n'), say=lambda _line: None)
    assert caught.value.code == "exists"
    assert state.marker.read_bytes() == before


def test_init_into_a_file_says_that_it_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StateError, match="not a directory"):
        init(tmp_path / "file", parse_config('[model]\npreset = "nano"\n'), say=lambda _line: None)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_init_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    config = parse_config(f'[model]\npreset = "none"\n[corpus]\nsources = ["{__file__}"]\n')
    with pytest.raises(TalkootError):
        init(tmp_path / "state", config, say=lambda _line: None)
    assert not (tmp_path / "state").exists()


def test_a_second_init_leaves_the_first_one_its_work(tmp_path: Path) -> None:
    root = tmp_path / "state"
    root.mkdir()
    with DirectoryLock(root, who="coordinator"):
        (root / "of-the-first").touch()
        with pytest.raises(StateError):
            init(root, parse_config('[model]\npreset = "nano"\n'), say=lambda _line: None)
        assert (root / "of-the-first").exists()


def test_a_directory_in_use_names_the_process_that_has_it(state: StateDir) -> None:
    with DirectoryLock(state.root, who="coordinator"):
        done = subprocess.run(
            [
                str(Path(sys.executable).parent / "talkoot-coordinator"),
                *("serve", "--state", str(state.root)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode != 0
    assert f"in use by another coordinator (process {os.getpid()})" in " ".join(
        (done.stdout + done.stderr).split()
    )
    assert "Traceback" not in done.stderr


def test_status_says_whether_anybody_serves_the_network(state: StateDir) -> None:
    def told() -> str:
        done = CliRunner().invoke(app, ["status", "--state", str(state.root)])
        assert done.exit_code == 0
        return done.stdout

    assert "It is not being served" in told()
    with DirectoryLock(state.root, who="coordinator"):
        assert "It is not being served" not in told()


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from talkoot.protocol.files import *;"
        "lock = DirectoryLock(Path(sys.argv[1]), who='test'); lock.acquire();"
        "print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        lock = DirectoryLock(tmp_path, who="test")
        with pytest.raises(StateError, match=str(holder.pid)):
            lock.acquire()
        assert DirectoryLock.is_held(tmp_path)
        holder.kill()
        lock.wait()
        lock.release()
        assert not DirectoryLock.is_held(tmp_path)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
