"""A coordinator is backed up while it runs, destroyed, and restored somewhere else.

One of its volunteers is watched all the while, by a hook in its Python and by strace.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.client.hostile.record import by_hook, by_kernel, not_due, strace, why_no_strace

from talkoot.server.audit import Audit, Auditor
from talkoot.sims import probe
from talkoot.sims.local import BIN, Command, LocalNetwork

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # a whole story in one set-up

HOSTILE = Path(__file__).parents[1] / "client" / "hostile"
JOIN_FLAGS = ("--threads", "1", "--checkpoint-seconds", "0.2")


@dataclass
class Story:
    """What happened to a network."""

    root: Path
    network: LocalNetwork
    elsewhere: LocalNetwork
    lost_version: int
    """The newest that the coordinator had published before it was destroyed."""
    restored: Audit
    """Of the restored state, before it served."""
    invite: str
    seen: dict[str, bytes]
    """What others may see while the network runs: logs, command lines, databases."""
    secrets: dict[str, bytes]
    """Every key and token there was, in the form in which it would be found."""


def _watched_join(network: LocalNetwork, name: str, url: str, root: Path) -> None:
    """Join under a hook and strace, with a home, a working and a temporary directory to look at."""
    network.home(name).parent.mkdir()
    for folder in ("watched", "user", "tmp"):
        (root / folder).mkdir()
    traced = [*strace(root / "kernel"), "-D"] if why_no_strace() is None else []
    home = ("--home", str(network.home(name)), "--name", name)
    network.nodes[name] = Command(
        name,
        [*traced, str(BIN / "talkoot"), "join", url, *home, *JOIN_FLAGS],
        network.root / "logs" / f"{name}.log",
        {
            "PYTHONPATH": str(HOSTILE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TALKOOT_WATCH": str(root / "watched"),
            "HOME": str(root / "user"),
            "TMPDIR": str(root / "tmp"),
        },
    )
    network.nodes[name].start()


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory, copy_state: Callable[..., None]
) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("restore")
    elsewhere = LocalNetwork(root / "another-machine")
    with LocalNetwork(root / "network") as network:
        try:
            yield _play(root, network, elsewhere, copy_state)
        finally:
            elsewhere.nodes = {}
            elsewhere.__exit__(None, None, None)
            print(network.tails(40), elsewhere.tails(40))


def _play(
    root: Path, network: LocalNetwork, elsewhere: LocalNetwork, copy_state: Callable[..., None]
) -> Story:
    copy_state(network, tokens_per_node=2048)
    network.serve()
    operator = network.coordinator
    assert operator is not None
    probe.until("the SuperLink", lambda: "Serving run" in operator.said(), network)
    url = network.invite(2)
    _watched_join(network, "ada", url, root)
    network.join("ben", url, *JOIN_FLAGS)
    network.wait_for(
        "both at work", lambda s: sum(n["contributions"] > 0 for n in s["nodes"]) == 2, 200
    )
    vault, passphrase = root / "vault", root / "passphrase"
    passphrase.write_text("a passphrase of some length\n")
    sealed = ("--passphrase-file", str(passphrase))
    said = network.run(
        "talkoot-coordinator", "backup", str(vault), "--state", str(network.state), *sealed
    )
    backed_up = int(said.partition(" of version ")[2].split()[0])
    # The volunteers see versions that the backup does not know.
    lost = network.wait_for("versions after that", lambda s: s["version"] >= backed_up + 3, 90)

    seen, secrets = _in_sight(network), _secrets(network, url, passphrase)
    network.kill_coordinator()
    shutil.rmtree(network.state)
    elsewhere.root.mkdir()
    (elsewhere.root / "volunteers").symlink_to(network.root / "volunteers")
    elsewhere.nodes = network.nodes
    network.run(
        *("talkoot-coordinator", "restore", str(vault), "--state", str(elsewhere.state)), *sealed
    )
    restored = Auditor(elsewhere.state).audit()
    elsewhere.serve()
    elsewhere.wait_for(
        "both at work again, further than they were",
        lambda s: s["version"] > lost["version"] and s["history"][-1]["contributions"] == 2,
        150,
    )
    elsewhere.wait_for("agreement of replicas", lambda s: probe.agree(s, "ada", "ben"), 60)
    elsewhere.stop()
    seen |= {f"vault/{p.name}": p.read_bytes() for p in vault.rglob("*") if p.is_file()}
    return Story(root, network, elsewhere, lost["version"], restored, url, seen, secrets)


def _in_sight(network: LocalNetwork) -> dict[str, bytes]:
    """Logs, command lines and databases, of everybody."""
    seen = {}
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = line.read_bytes()
            if not words.startswith(b"strace"):  # which the test itself has given the invite
                seen[str(line)] = words
    for path in network.root.rglob("*"):
        if path.is_file() and (path.suffix in (".log", ".out") or ".db" in path.suffix):
            seen[str(path)] = path.read_bytes()
    return seen


def _secrets(network: LocalNetwork, invite: str, passphrase: Path) -> dict[str, bytes]:
    found = {
        "the invite's token": invite.partition("token=")[2].encode(),
        "the passphrase": passphrase.read_bytes().strip(),
    }
    for path in network.root.rglob("*"):
        if path.is_file() and path.stat().st_size < 16_384:
            text = path.read_bytes()
            if b"PRIVATE KEY" in text:  # what is between the first line and the last
                found[str(path)] = text.splitlines()[2]
    return found


def test_volunteers_follow_a_coordinator_that_was_restored_elsewhere_back_and_go_on(
    story: Story,
) -> None:
    assert story.restored.findings == []
    assert Auditor(story.elsewhere.state).audit().findings == []
    versions = probe.versions(story.elsewhere)
    assert versions[-1][0] > story.lost_version
    for name in ("ada", "ben"):
        said = story.network.nodes[name].said()
        assert "Traceback" not in said
        assert "The coordinator was restored from a backup; going back with it." in said
        # What is on their disks is of the new history, which went another way than the old.
        held = probe.held_version(story.elsewhere, name)
        assert (held, probe.replica_digest(story.elsewhere, name)) in versions


def test_a_daemon_runs_nothing_but_itself_and_writes_below_its_home_only(story: Story) -> None:
    below = [story.network.home("ada"), story.root / "tmp"]
    ports = [story.elsewhere.gateway_port, int(story.elsewhere.ports["transfer_port"])]
    acts = list(by_hook(story.root / "watched"))
    assert {act.kind for act in acts} >= {"write", "import", "code", "run", "connect"}
    assert not_due(acts, below=below, ports=ports) == {}
    assert list((story.root / "user").iterdir()) == []
    if (story.root / "kernel").exists():
        seen = list(by_kernel(story.root / "kernel"))
        assert {act.kind for act in seen} >= {"write", "run", "connect"}
        may = [*below, story.root / "watched"]
        assert not_due(seen, below=may, ports=ports) == {}


def test_no_key_token_or_passphrase_is_in_a_log_on_a_command_line_or_in_a_database(
    story: Story,
) -> None:
    assert {Path(name).name for name in story.secrets} >= {
        *("the invite's token", "the passphrase", "coordinator.pem", "ca-key.pem", "server.key"),
        *("superlink.key", "identity.pem"),
    }
    kinds = [name.rpartition("/")[2] for name in story.seen]
    assert {"cmdline", "ledger.db", "flower.db", "daemon.log", "superlink.log"} <= set(kinds)
    assert any(b"\0join\0" in words for words in story.seen.values())
    found = [
        (what, where)
        for what, secret in story.secrets.items()
        for where, text in story.seen.items()
        if secret in text
    ]
    assert found == []


def test_secrets_are_for_their_owner_only(story: Story) -> None:
    state, homes = story.elsewhere.state, story.network.root / "volunteers"
    directories = [state, *(state / n for n in ("ca", "keys", "tls", "store", "versions", "logs"))]
    directories += [state / "tls" / "loopback", *homes.iterdir(), story.root / "vault"]
    assert {stat.S_IMODE(d.stat().st_mode) for d in directories} == {0o700}
    files = [p for d in (state / "ca", state / "keys", state / "tls") for p in d.rglob("*")]
    files += [state / "config.toml", state / "ledger.db", state / "flower.db"]
    for home in homes.iterdir():
        files += [home / "identity.pem", home / "enrolment.json"]
    files += list((story.root / "vault" / "secrets").iterdir())
    assert {stat.S_IMODE(p.stat().st_mode) for p in files if p.is_file()} == {0o600}
