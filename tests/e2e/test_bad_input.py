"""What comes in wrong from outside: one clear sentence, a failing exit status, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from talkoot.protocol.invite import Invite
from talkoot.server.config import load_config
from talkoot.sims import probe
from talkoot.sims.local import LocalNetwork

pytestmark = pytest.mark.e2e

SentenceOf = Callable[[subprocess.CompletedProcess[str]], str]


def _serve(network: LocalNetwork) -> subprocess.CompletedProcess[str]:
    return network.attempt("talkoot-coordinator", "serve", "--state", str(network.state))


def _join(network: LocalNetwork, url: str, name: str) -> subprocess.CompletedProcess[str]:
    home = str(network.home(name))
    return network.attempt("talkoot", "join", url, "--home", home, "--threads", "1")


@contextlib.contextmanager
def _read_only(path: Path) -> Iterator[None]:
    """A read-only mount over ``path``: what stops even root."""
    done = subprocess.run(["mount", "--bind", str(path), str(path)], check=False)
    if done.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


# The volunteer --------------------------------------------------------------------------------


def test_each_wrong_invite_is_refused_with_its_own_sentence_and_enrols_nobody(
    coordinator: LocalNetwork, sentence_of: SentenceOf
) -> None:
    good = Invite.parse(coordinator.invite(1))

    def varied(
        host: str = good.host, ca: str = good.ca_fingerprint, token: str | None = good.token
    ) -> str:
        return Invite(host=host, port=good.port, ca_fingerprint=ca, token=token).url()

    brief = coordinator.run(
        *("talkoot-coordinator", "invite", "--state", str(coordinator.state)),
        *("--expires", "1s"),
    ).strip()
    said = {
        "cut": sentence_of(_join(coordinator, good.url().split("&")[0], "eve")),
        "no link": sentence_of(_join(coordinator, "hello", "eve")),
        "token": sentence_of(_join(coordinator, varied(token="x" * 32), "eve")),
        "ca": sentence_of(_join(coordinator, varied(ca="0" * 64), "eve")),
    }
    query = "SELECT * FROM invites WHERE expires_unix - created_unix < 2 AND expires_unix < ?"
    probe.until(
        "the invite's end",
        lambda: probe.rows(coordinator, query, time.time()),
        coordinator,
    )
    said["expired"] = sentence_of(_join(coordinator, brief, "eve"))

    assert "token= is missing" in said["cut"]
    assert "does not begin with https://" in said["no link"]
    assert "invite" in said["token"]
    assert "expired" in said["expired"]
    assert said["ca"].startswith("Wrong CA fingerprint")
    assert len(set(said.values())) == len(said)
    assert not (coordinator.home("eve") / "enrolment.json").exists()
    assert probe.rows(coordinator, "SELECT * FROM nodes WHERE name = 'eve'") == []
    # None of it cost the good invite its use.
    uses = probe.rows(coordinator, "SELECT SUM(uses_left) AS n FROM invites")[0]["n"]
    assert uses == 2


def test_a_used_invite_lets_nobody_else_in_and_a_new_one_does(
    coordinator: LocalNetwork, sentence_of: SentenceOf
) -> None:
    url = coordinator.invite(1)
    enrol = ("talkoot", "join", url, "--enrol-only", "--threads", "1")
    coordinator.run(*enrol, "--name", "ada", "--home", str(coordinator.home("ada")))
    sentence = sentence_of(_join(coordinator, url, "late"))
    assert "used" in sentence
    again = ("talkoot", "join", coordinator.invite(1), "--enrol-only", "--threads", "1")
    coordinator.run(*again, "--name", "late", "--home", str(coordinator.home("late")))
    nodes = probe.rows(coordinator, "SELECT name FROM nodes ORDER BY name")
    assert {"ada", "late"} <= {row["name"] for row in nodes}


def test_joining_a_coordinator_that_is_down_says_so(
    empty_network: LocalNetwork, made_state: Path, sentence_of: SentenceOf
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and not listening
        port = nobody.getsockname()[1]
        url = Invite(host="127.0.0.1", port=port, ca_fingerprint="0" * 64, token="x" * 32).url()
        sentence = sentence_of(_join(empty_network, url, "ada"))
    assert f"No coordinator answers at 127.0.0.1:{port}" in sentence


def test_coming_back_to_a_home_where_nobody_lives_says_so(
    empty_network: LocalNetwork, sentence_of: SentenceOf
) -> None:
    home = ("--home", str(empty_network.home("nobody")))
    assert "join with" in sentence_of(empty_network.attempt("talkoot", "join", *home))
    for command in ("status", "pause", "resume", "leave"):
        assert "No node lives" in sentence_of(empty_network.attempt("talkoot", command, *home))


def test_a_home_that_cannot_be_written_is_refused(
    empty_network: LocalNetwork, sentence_of: SentenceOf
) -> None:
    url = Invite(host="127.0.0.1", port=9, ca_fingerprint="0" * 64, token="x" * 32).url()
    home = empty_network.home("ada")
    home.mkdir(parents=True)
    with _read_only(home):
        assert "read-only" in sentence_of(_join(empty_network, url, "ada"))


# The operator ---------------------------------------------------------------------------------


def test_a_second_coordinator_on_the_same_state_is_refused_and_the_first_serves_on(
    coordinator: LocalNetwork, sentence_of: SentenceOf
) -> None:
    pids = probe.part_pids(coordinator)
    sentence = sentence_of(_serve(coordinator))
    assert "in use by another coordinator" in sentence
    assert str(pids["supervisor"]) in sentence
    assert probe.part_pids(coordinator) == pids
    assert coordinator.status() is not None


def test_a_taken_port_is_named_and_the_state_is_as_it_was(
    empty_network: LocalNetwork, copy_state: Callable[..., None], sentence_of: SentenceOf
) -> None:
    network = empty_network
    copy_state(network)
    config = load_config(network.state / "config.toml").network
    for name in ("gateway_port", "transfer_port", "superlink_port"):
        port = getattr(config, name)
        with socket.create_server(("127.0.0.1", port)):
            sentence = sentence_of(_serve(network))
        assert str(port) in sentence
        assert name in sentence
    assert probe.versions(network)[0][0] == 0


def test_a_state_that_is_missing_half_made_or_newer_is_refused_and_left_alone(
    empty_network: LocalNetwork,
    copy_state: Callable[..., None],
    sentence_of: SentenceOf,
    tmp_path: Path,
    config_text: Callable[..., str],
) -> None:
    network = empty_network
    assert "There is no state directory" in sentence_of(_serve(network))

    copy_state(network)
    config = tmp_path / "config.toml"
    config.write_text(config_text())
    init = ("talkoot-coordinator", "init", "--config", str(config), "--state", str(network.state))
    assert "already" in sentence_of(network.attempt(*init))

    with contextlib.closing(sqlite3.connect(network.state / "ledger.db")) as ledger:
        (revision,) = ledger.execute("SELECT version_num FROM alembic_version").fetchone()
        ledger.execute("UPDATE alembic_version SET version_num = '9999'")
        ledger.commit()
        assert "schema 9999, which is newer" in sentence_of(_serve(network))
        ledger.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        ledger.commit()

    (network.state / "state.json").rename(tmp_path / "state.json")
    before = sorted(path.name for path in network.state.iterdir())
    assert "half made" in sentence_of(_serve(network))
    assert "not empty" in sentence_of(network.attempt(*init))
    assert sorted(path.name for path in network.state.iterdir()) == before


def test_a_read_only_state_is_refused(
    empty_network: LocalNetwork, copy_state: Callable[..., None], sentence_of: SentenceOf
) -> None:
    copy_state(empty_network)
    with _read_only(empty_network.state):
        assert "read-only" in sentence_of(_serve(empty_network))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("learning_rate = ", "learning_rat = ", ("inner.learning_rat", "learning_rate")),
        ("learning_rate = 4e-3", "learning_rate = -1.0", ("inner.learning_rate", "-1.0")),
        ("block_tokens = 512", "block_tokens = 500", ("corpus.block_tokens", "500")),
        ('preset = "nano"', 'preset = "nanoo"', ("nanoo",)),
        ("[run]", "[run", ("not valid TOML",)),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_its_key_and_makes_nothing(
    empty_network: LocalNetwork,
    config_text: Callable[..., str],
    sentence_of: SentenceOf,
    old: str,
    new: str,
    words: tuple[str, ...],
) -> None:
    sentence = _refused_init(empty_network, config_text().replace(old, new, 1), sentence_of)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ("holds no text",)),
        ({"empty.txt": b""}, ("holds no text",)),
        ({"noise.txt": bytes(range(256)) * 64}, ("holds no text",)),
    ],
    ids=["no file", "an empty file", "not text"],
)
def test_a_corpus_without_text_is_refused_and_makes_nothing(
    empty_network: LocalNetwork,
    config_text: Callable[..., str],
    corpus: Path,
    sentence_of: SentenceOf,
    tmp_path: Path,
    files: dict[str, bytes],
    words: tuple[str, ...],
) -> None:
    folder = tmp_path / "no-text"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    text = config_text().replace(str(corpus), str(folder))
    sentence = _refused_init(empty_network, text, sentence_of)
    assert str(folder) in sentence
    for word in words:
        assert word in sentence


def _refused_init(network: LocalNetwork, text: str, sentence_of: SentenceOf) -> str:
    config = network.root / "config.toml"
    config.write_text(text)
    state = ("--state", str(network.state))
    sentence = sentence_of(
        network.attempt("talkoot-coordinator", "init", "--config", str(config), *state)
    )
    assert not network.state.exists()
    return sentence


def test_a_second_ctrl_c_ends_the_coordinator_and_all_its_parts_at_once(
    empty_network: LocalNetwork, copy_state: Callable[..., None]
) -> None:
    network = empty_network
    copy_state(network)
    network.serve()
    network.wait_for("the coordinator", lambda _: True, 90)
    pids = probe.part_pids(network)
    coordinator = network.coordinator
    assert coordinator is not None
    assert coordinator.process is not None
    os.kill(pids["transfer"], signal.SIGSTOP)  # a part that does not end when asked
    coordinator.process.send_signal(signal.SIGINT)
    probe.until("an answer", lambda: "Ctrl-C again" in coordinator.said(), network)
    coordinator.process.send_signal(signal.SIGINT)
    assert coordinator.process.wait(30) == 130
    assert "Traceback" not in coordinator.said()
    probe.until("the parts' end", lambda: not any(map(probe.runs, pids.values())), network)
    shutil.rmtree(network.state)  # nobody writes there any more
