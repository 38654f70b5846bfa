"""What ``talkoot.server.flower`` relies on in Flower, each thing tried out on the real one.

When a new flwr breaks one of these, its name says what to mend.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from talkoot.client import flower as client_flower
from talkoot.client.flower import FleetHost
from talkoot.protocol.control import (
    MESSAGE_TYPE,
    TASK_KEY,
    TASK_RECORD,
    VERDICT_KEY,
    VERDICT_RECORD,
)
from talkoot.protocol.errors import RefusedError, UnavailableError
from talkoot.protocol.identity import NodeKey
from talkoot.server import flower
from talkoot.server.flower import (
    _BUNDLE,
    ControlApi,
    drop_damaged_bundles,
    superlink_command,
    superlink_environment,
)
from talkoot.sims.superlink import LocalSuperLink

PROBE = b"""
import json, os, time
from pathlib import Path
from flwr.serverapp import ServerApp
from talkoot.server import flower

flower.REPLY_SECONDS = 3.0
app = ServerApp()

@app.main()
def main(grid, context):
    # Does what it finds in a file, and writes what came of it into another, until told to end.
    control, folder, number = flower.WaryGridControl(grid), Path(os.environ["PROBE"]), 0
    while True:
        order = folder / f"order-{number}.json"
        if not order.exists():
            time.sleep(0.05)
            continue
        call, arguments = json.loads(order.read_text())
        if call == "end":
            return
        if call == "send":
            tasks = {int(node): text for node, text in arguments.items()}
            out = control.send(tasks, round_number=7, ttl_seconds=600.0)
        else:
            out = getattr(control, call)()
        out = sorted(out) if call == "online" else list(out) if call == "replies" else out
        part = folder / f"answer-{number}.part"
        part.write_text(json.dumps(out))
        part.rename(folder / f"answer-{number}.json")
        number += 1
"""


class Probe:
    """A real ServerApp in Flower's own process, driven from here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def call(self, name: str, arguments: Any = None) -> Any:
        self.tell(name, arguments)
        answer = self._folder / f"answer-{self._number}.json"
        _until(answer.exists)
        self._number += 1
        return json.loads(answer.read_text())

    def tell(self, name: str, arguments: Any = None) -> None:
        part = self._folder / f"order-{self._number}.part"
        part.write_text(json.dumps([name, arguments]))
        part.rename(self._folder / f"order-{self._number}.json")


def _until(holds: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory, orders: Path) -> Iterator[LocalSuperLink]:
    root = tmp_path_factory.mktemp("flower") / "superlink"
    with LocalSuperLink(root, superexec=True, env={"PROBE": str(orders)}) as running:
        yield running


@pytest.fixture
def control(superlink: LocalSuperLink) -> ControlApi:
    return superlink.control


def _submit_probe(control: ControlApi) -> int:
    """A run whose ServerApp is ``PROBE``, submitted the way our own bundle is."""
    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    project = _BUNDLE.replace(b"talkoot.server.app:app", b"probe_app:app")
    content, _ = build_fab_from_files({"pyproject.toml": project, "probe_app.py": PROBE})
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    return int(control._call("StartRun", StartRunRequest(fab=fab)).run_id)


# The command line --------------------------------------------------------------------------------


def test_flower_superlink_knows_every_flag_that_we_give_it(tmp_path: Path) -> None:
    command = superlink_command(
        port=1,
        database=tmp_path / "db",
        certificate=tmp_path / "cert",
        key=tmp_path / "key",
        ca=tmp_path / "ca",
    )
    known = subprocess.run([command[0], "--help"], capture_output=True, text=True, check=True)
    missing = [flag for flag in command if flag.startswith("--") and flag not in known.stdout]
    assert missing == []
    assert "process" in known.stdout.split("--isolation", 2)[2].split("--database")[0]


def test_flower_superexec_knows_every_flag_that_we_give_it() -> None:
    command = superlink_command(port=1, database=Path(), certificate=Path(), key=Path(), ca=Path())
    program = str(Path(command[0]).with_name("flower-superexec"))
    known = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert "--runtime-api-address" in known.stdout
    assert "--root-certificates" in known.stdout


def test_superexec_still_takes_its_poll_interval_from_the_environment() -> None:
    from flwr.supercore.superexec import run_superexec

    env = superlink_environment({}, Path("/nowhere"))
    name = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
    assert env[name] == "0.2"
    package = Path(inspect.getfile(run_superexec)).parents[2]
    assert any(name in path.read_text("utf-8") for path in package.rglob("*.py"))


def test_telemetry_and_update_checks_still_have_their_switches() -> None:
    import flwr

    env = superlink_environment({}, Path("/nowhere"))
    sources = [path.read_text("utf-8") for path in Path(flwr.__file__).parent.rglob("*.py")]
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_HOME"):
        assert name in env
        assert any(name in source for source in sources), f"flwr does not read {name} any more"


def test_the_superlink_keeps_its_database_where_we_say(superlink: LocalSuperLink) -> None:
    assert (superlink.root / "flower.db").is_file()


# The Control API ----------------------------------------------------------------------------------


def test_a_key_is_registered_once_and_found_again(control: ControlApi) -> None:
    pem = NodeKey.generate().public_pem
    assert pem not in control.registered_nodes()
    node_id = control.register_node(pem, "ada")
    assert node_id is not None
    assert node_id > 0
    assert control.registered_nodes()[pem] == node_id
    # The second time is told by "in use", which register_node turns into None.
    assert control.register_node(pem, "ada") is None


def test_a_key_that_was_unregistered_is_lost_to_flower_for_ever(control: ControlApi) -> None:
    pem = NodeKey.generate().public_pem
    node_id = control.register_node(pem, "ben")
    assert node_id is not None
    from flwr.proto.control_pb2 import UnregisterNodeRequest

    control._call("UnregisterNode", UnregisterNodeRequest(node_id=node_id))
    # Neither found nor taken again. Whoever may come back must not be unregistered.
    assert pem not in control.registered_nodes()
    assert control.register_node(pem, "ben") is None


def test_what_is_no_key_is_refused_with_a_sentence(control: ControlApi) -> None:
    with pytest.raises(RefusedError, match="RegisterNode"):
        control.register_node(b"no key", "eve")


def test_nobody_on_the_port_is_unavailable(superlink: LocalSuperLink) -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        ControlApi(1, superlink.ca_pem).runs()


def test_a_bundle_of_nothing_but_names_starts_the_installed_serverapp(
    superlink: LocalSuperLink, control: ControlApi
) -> None:
    run_id = control.start_run()
    # No state is configured here, so our ServerApp ends with the sentence that says so: which
    # proves that Flower found it, and how a run that failed looks.
    status, sub_status, details = _until(
        lambda: run if (run := control.runs()[run_id])[0] == "finished" else None
    )
    assert (status, sub_status) == ("finished", "failed"), superlink.log()
    assert "TALKOOT_STATE is not set" in details + superlink.log()
    control.stop_run(run_id)  # harmless: "finished" is not an error of ours


# The Grid ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(superlink: LocalSuperLink, orders: Path) -> Iterator[Probe]:
    run_id = _submit_probe(superlink.control)
    _until(lambda: superlink.control.runs()[run_id][0] == "running")
    probe = Probe(orders)
    yield probe
    probe.tell("end")
    _until(lambda: superlink.control.runs()[run_id][0] == "finished")


def _app(answer: Callable[[Message], RecordDict]) -> ClientApp:
    """An app that answers each task so."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # flwr is not typed for us
    def train(message: Message, _context: Context) -> Message:
        return Message(answer(message), reply_to=message)

    return app


def _verdict(text: str) -> RecordDict:
    return RecordDict({VERDICT_RECORD: ConfigRecord({VERDICT_KEY: text})})


def _node(superlink: LocalSuperLink, app: ClientApp) -> FleetHost:
    key = NodeKey.generate()
    superlink.register(key)
    return FleetHost(superlink.address, superlink.ca_pem, key, app, {})


def test_the_grid_tells_who_is_online(superlink: LocalSuperLink, probe: Probe) -> None:
    host = _node(superlink, ClientApp())
    assert probe.call("online") == []
    node_id = host.connect(1.0)
    assert probe.call("online") == [node_id]
    host.close()
    assert probe.call("online") == []


def test_a_task_reaches_its_node_and_the_verdict_comes_back(
    superlink: LocalSuperLink, probe: Probe
) -> None:
    seen: list[tuple[Any, str, str]] = []

    def answer(message: Message) -> RecordDict:
        text = message.content.config_records[TASK_RECORD][TASK_KEY]
        seen.append((text, message.metadata.message_type, message.metadata.group_id))
        return _verdict(f"verdict on {text}")

    app = _app(answer)
    host, other = _node(superlink, app), _node(superlink, app)
    node_id, other_id = host.connect(1.0), other.connect(1.0)
    try:
        probe.call("send", {node_id: "a task"})
        assert other.poll() is False  # it is for one node
        assert host.poll() is True
        assert seen == [("a task", MESSAGE_TYPE, "7")]
        assert host.poll() is False  # and comes once
        replies = _until(lambda: probe.call("replies"))
        assert replies == [[node_id, "verdict on a task"]]
        assert probe.call("replies") == []

        # A reply to an earlier round is not waited for.
        probe.call("send", {other_id: "an old task"})
        probe.call("forget")
        assert other.poll() is True
        assert probe.call("replies") == []
    finally:
        host.close()
        other.close()


def test_a_reply_without_a_verdict_is_told_as_none(superlink: LocalSuperLink, probe: Probe) -> None:
    host = _node(superlink, _app(lambda _message: RecordDict({})))
    node_id = host.connect(1.0)
    try:
        probe.call("send", {node_id: "a task"})
        assert host.poll() is True
        assert _until(lambda: probe.call("replies")) == [[node_id, None]]
    finally:
        host.close()


def test_a_reply_whose_parts_never_come_holds_up_nobody(
    superlink: LocalSuperLink, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = _app(lambda _message: _verdict("done"))
    liar, honest = _node(superlink, app), _node(superlink, app)
    liar_id, honest_id = liar.connect(1.0), honest.connect(1.0)
    try:
        probe.call("send", {liar_id: "a", honest_id: "b"})
        with monkeypatch.context() as patched:
            patched.setattr(client_flower, "push_objects", lambda *_arguments, **_options: None)
            assert liar.poll() is True
        assert honest.poll() is True
        # Flower's own way would wait two hours for the first before it gives the second.
        replies = _until(lambda: probe.call("replies"))
        assert replies == [[honest_id, "done"]]
        assert _until(lambda: probe.call("replies")) == [[liar_id, None]]
        assert probe.call("replies") == []
    finally:
        liar.close()
        honest.close()


def test_a_reply_of_more_parts_than_any_of_ours_is_not_read(
    superlink: LocalSuperLink, probe: Probe
) -> None:
    records = {f"record {n}": ConfigRecord({"n": n}) for n in range(flower.MAX_PARTS)}
    records[VERDICT_RECORD] = ConfigRecord({VERDICT_KEY: "done"})
    host = _node(superlink, _app(lambda _message: RecordDict(dict(records))))
    node_id = host.connect(1.0)
    try:
        probe.call("send", {node_id: "a task"})
        assert host.poll() is True
        assert _until(lambda: probe.call("replies")) == [[node_id, None]]
    finally:
        host.close()


def test_a_task_for_a_node_that_is_gone_does_not_stop_the_others(
    superlink: LocalSuperLink, probe: Probe
) -> None:
    app = _app(lambda _message: _verdict("done"))
    gone, here = _node(superlink, app), _node(superlink, app)
    gone_id, here_id = gone.connect(1.0), here.connect(1.0)
    gone.close()
    try:
        probe.call("send", {gone_id: "lost", here_id: "found"})
        assert here.poll() is True
        # Flower's own error for the one that is gone is no word of that node: its lease is kept.
        assert _until(lambda: probe.call("replies")) == [[here_id, "done"]]
        assert probe.call("replies") == []
    finally:
        here.close()


def test_a_grid_has_the_calls_that_the_round_loop_makes() -> None:
    for name in ("get_node_ids", "push_messages", "pull_messages"):
        assert callable(getattr(Grid, name, None)), f"Grid.{name} is gone"
    for name in ("_runtime_client", "run"):
        assert isinstance(getattr(HttpGrid, name, None), property), f"HttpGrid.{name} is gone"
    assert "node" in vars(HttpGrid(token="none"))
    for call in ("PullMessages", "PullObject", "ConfirmMessageReceived"):
        assert callable(getattr(RuntimeHttpClient, call, None)), f"RuntimeHttpClient.{call} is gone"


def test_a_bundle_that_was_torn_on_the_disk_is_removed_and_a_whole_one_kept(tmp_path: Path) -> None:
    drop_damaged_bundles(tmp_path)  # nothing is there yet
    whole, torn, empty = (tmp_path / "apps" / name for name in ("whole", "torn", "empty"))
    for app in (whole, torn, empty):
        app.mkdir(parents=True)
    (whole / "pyproject.toml").write_bytes(flower._BUNDLE)
    (torn / "pyproject.toml").write_bytes(b"")
    drop_damaged_bundles(tmp_path)
    assert list((tmp_path / "apps").iterdir()) == [whole]
