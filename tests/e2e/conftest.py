"""Networks of real processes for tests: a state that is made once, and copied for each network."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from talkoot.protocol.errors import TalkootError
from talkoot.server.config import RoundSection, dump_config, load_config
from talkoot.server.setup import with_free_ports
from talkoot.sims.local import LocalNetwork

JOIN_FLAGS = ("--threads", "1", "--checkpoint-seconds", "0.2")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of real text: some of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(stdlib.glob("[at]*.py")):
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def config_text(corpus: Path) -> Callable[..., str]:
    """Writes an operator's configuration for a nano model.

    ``rounds`` of the run, ``tokens`` of a lease, and ``more`` lines at the end.
    """

    def write(rounds: int = 10_000, tokens: int = 8192, more: str = "") -> str:
        return f"""[run]
name = "test"
rounds = {rounds}

[model]
preset = "nano"
sequence_length = 64
micro_batch = 4

[corpus]
sources = ["{corpus}"]
block_tokens = 512
heldout_fraction = 0.05

[inner]
learning_rate = 4e-3

[round]
tokens_per_node = {tokens}
deadline_seconds = 300
lost_after_seconds = 60
checkpoint_every = 4

[network]
bind = "127.0.0.1"
gateway_port = 0
transfer_port = 0
{more}"""

    return write


@pytest.fixture(scope="session")
def made_state(tmp_path_factory: pytest.TempPathFactory, config_text: Callable[..., str]) -> Path:
    """An operator's state with no end of rounds, made by ``init``; never served, only copied."""
    root = tmp_path_factory.mktemp("made")
    (root / "config.toml").write_text(config_text())
    with LocalNetwork(root / "network") as network:
        network.init(root / "config.toml")
    return network.state


@contextmanager
def _watched(networks: Sequence[LocalNetwork]) -> Iterator[None]:
    """End what runs, and show the logs: pytest keeps them to itself unless the test fails."""
    try:
        yield
    finally:
        for network in networks:
            network.__exit__(None, None, None)
            print(network.tails(40))


@pytest.fixture
def empty_network(tmp_path: Path) -> Iterator[LocalNetwork]:
    """A network without any state."""
    with LocalNetwork(tmp_path / "network") as network, _watched([network]):
        yield network


@pytest.fixture(scope="session")
def copy_state(made_state: Path) -> Callable[..., None]:
    """Puts a copy of the made state into a network, with ports of its own.

    Keywords vary its ``[round]``.
    """

    def copy(network: LocalNetwork, **round_section: Any) -> None:
        shutil.copytree(made_state, network.state, dirs_exist_ok=True)
        config = load_config(network.state / "config.toml")
        any_port = {"gateway_port": 0, "transfer_port": 0, "superlink_port": 0}
        varied = {
            "network": config.network.model_copy(update=any_port),
            "round": RoundSection.model_validate({**config.round.model_dump(), **round_section}),
        }
        config = with_free_ports(config.model_copy(update=varied))
        (network.state / "config.toml").write_text(dump_config(config))

    return copy


@pytest.fixture
def run_network(
    empty_network: LocalNetwork, copy_state: Callable[..., None]
) -> Callable[..., LocalNetwork]:
    """Starts a coordinator and volunteers of these names; keywords vary its ``[round]``."""

    def run(*names: str, **round_section: Any) -> LocalNetwork:
        network = empty_network
        copy_state(network, **round_section)
        network.serve()
        network.wait_for("the coordinator", lambda _: True, 90)
        url = network.invite(max(1, len(names)))
        for name in names:
            network.join(name, url, *JOIN_FLAGS)
        return network

    return run


@pytest.fixture(scope="module")
def coordinator(
    tmp_path_factory: pytest.TempPathFactory, copy_state: Callable[..., None]
) -> Iterator[LocalNetwork]:
    """A coordinator that serves, and has no nodes: for those who only knock at its door."""
    with LocalNetwork(tmp_path_factory.mktemp("coordinator") / "network") as network:
        copy_state(network)
        with _watched([network]):
            network.serve()
            network.wait_for("the coordinator", lambda _: True, 90)
            yield network


@pytest.fixture(scope="session")
def sentence_of() -> Callable[[subprocess.CompletedProcess[str]], str]:
    """The one sentence of a command that refused; anything else it said is an error."""

    def sentence(done: subprocess.CompletedProcess[str]) -> str:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode != 1 or "Traceback" in done.stdout + done.stderr or len(lines) != 1:
            raise TalkootError(
                f"exit status {done.returncode}, standard error:\n{done.stderr}\n"
                f"standard output:\n{done.stdout}"
            )
        assert lines[0].startswith("error: ")
        assert lines[0].endswith(".")
        return lines[0].removeprefix("error: ")

    return sentence
