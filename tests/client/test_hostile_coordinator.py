"""A coordinator that means harm, with every key in its hand, against a volunteer's processes.

The worst case: the operator. CA, signing key and data plane are the real ones. The node's worker
and trainer run in processes of their own, in which an audit hook (PEP 578) and, where it is there,
strace put on record what they do. All that it can do is to waste the node's time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.client.hostile.record import by_hook, by_kernel, not_due, strace, why_no_strace

from talkoot.client.home import Home
from talkoot.client.worker import MAX_WAIT_SECONDS, MIN_WAIT_SECONDS
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.limits import MAX_CONTROL_MESSAGE, MIB, TRANSFER_CHUNK
from talkoot.protocol.messages import (
    ArtifactRef,
    Head,
    Message,
    MirrorList,
    NodeReport,
    NodeReportReply,
    RoundTask,
    RunSpec,
    Signed,
    Verdict,
    VersionRef,
    canonical_bytes,
    parse,
)
from talkoot.protocol.wire import transfer_pb2_grpc
from talkoot.protocol.wire.transfer_pb2 import FetchChunk
from talkoot.server import transfer
from talkoot.server.desk import Desk
from talkoot.sims.in_process import InProcessCoordinator, nano_state, task_of
from talkoot.sims.local import environment

HOSTILE = Path(__file__).parent / "hostile"
CANARY = "talkoot-canary"
YEAR = 365 * 86400.0


class HostileDesk(Desk):
    """The real desk, whose every answer a test can change."""

    spec: Signed | None = None
    given: Signed | None = None
    reply: Callable[[NodeReportReply], NodeReportReply] = staticmethod(lambda reply: reply)
    list_of_mirrors: Signed | None = None
    verdict: Verdict | None = None

    def submit(self, node_id: str, signed: Signed) -> Verdict:
        return self.verdict or super().submit(node_id, signed)

    def run_spec(self, node_id: str) -> Signed:
        return self.spec or super().run_spec(node_id)

    def task(self, node_id: str) -> Signed | None:
        return self.given or super().task(node_id)

    def mirrors(self, node_id: str) -> Signed:
        return self.list_of_mirrors or super().mirrors(node_id)

    def report(self, node_id: str, report: NodeReport) -> NodeReportReply:
        return self.reply(super().report(node_id, report))


@dataclass
class Operator:
    """The malicious one: real state, real keys, and a node that believes its signatures."""

    site: InProcessCoordinator
    home: Home
    watched: Path
    canaries: Path
    driver: subprocess.Popen[str]
    kernel: Path | None
    ports: list[int] = field(default_factory=list)

    def ask(self, op: str, **more: object) -> dict[str, Any]:
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        self.driver.stdin.write(json.dumps({"op": op} | more) + "\n")
        self.driver.stdin.flush()
        line = self.driver.stdout.readline()
        assert line, "the node's process died"
        reply: dict[str, Any] = json.loads(line)
        assert "crash" not in reply, reply["crash"]
        return reply

    def refused(self, op: str, **more: object) -> str:
        """What the node says no with: an error's code, or a verdict's."""
        for _ in range(10):
            reply = self.ask(op, **more)
            said = reply.get("error") or reply["ok"]
            assert said is not None, f"{op} was believed"
            if said.get("type") != "UnavailableError":  # a busy machine: nobody has answered yet
                break
        assert said.get("accepted", False) is False
        assert said["sentence"].isprintable()
        return str(said["code"])

    @property
    def node_id(self) -> str:
        return NodeKey.load(self.home.key).node_id

    def sign(self, message: Message) -> Signed:
        return self.site.coordinator.key.sign(type(message).__name__, canonical_bytes(message))

    def put(self, data: bytes) -> ArtifactRef:
        return self.site.coordinator.store.put_bytes(data)

    def get(self, ref: ArtifactRef) -> bytes:
        return self.site.coordinator.store.path(ref.digest).read_bytes()

    @property
    def spec(self) -> RunSpec:
        return self.site.coordinator.spec

    @property
    def config(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.get(self.spec.model))
        return document

    def task(self) -> RoundTask:
        """An honest task for the node, of the round that is open."""
        return task_of(self.site.lease(self.node_id))

    def canary(self, name: str) -> str:
        """A file that nothing but executed code would make."""
        return str(self.canaries / f"{CANARY}-{name}")


def as_json(signed: Signed) -> dict[str, Any]:
    return signed.model_dump()


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    root = tmp_path_factory.mktemp("hostile")
    folders = {n: root / n for n in ("watched", "canaries", "tmp", "user", "cwd")}
    for folder in folders.values():
        folder.mkdir()
    # Nobody who means harm slows a node down.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(transfer, "QUOTAS", dict.fromkeys(transfer.QUOTAS, (1e9, 1e9)))
    with InProcessCoordinator(nano_state(root / "made"), root / "state", HostileDesk) as site:
        home = Home(root / "home")
        enrolment = site.enrol(home, "ada")
        kernel = root / "kernel" if why_no_strace() is None else None
        driver = subprocess.Popen(
            [
                *(strace(kernel) if kernel is not None else ()),
                *(sys.executable, "-B", str(HOSTILE / "driver.py"), str(home.root)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folders["cwd"],
            env={k: v for k, v in environment().items() if not k.startswith("TORCH")}
            | {
                "PYTHONPATH": str(HOSTILE),
                "PYTHONDONTWRITEBYTECODE": "1",
                "TALKOOT_WATCH": str(folders["watched"]),
                "TMPDIR": str(folders["tmp"]),
                "HOME": str(folders["user"]),
                "OMP_NUM_THREADS": "1",
            },
        )
        made = Operator(site, home, folders["watched"], folders["canaries"], driver, kernel)
        made.ports += [enrolment.gateway_port, enrolment.transfer_port]
        yield made
        driver.kill()
        driver.wait()
    monkeypatch.undo()


@pytest.fixture
def desk(operator: Operator) -> Iterator[HostileDesk]:
    """Honest again afterwards, and a node that has seen nothing."""
    operator.ask("again")
    desk = operator.site.desk
    assert isinstance(desk, HostileDesk)
    yield desk
    for name in ("spec", "given", "reply", "list_of_mirrors", "verdict"):
        vars(desk).pop(name, None)


def test_an_honest_lease_is_done(operator: Operator) -> None:
    operator.ask("prepare")
    done = operator.ask("execute", signed=as_json(operator.sign(operator.task())))
    assert done["ok"]["accepted"]


# Things to run ------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def pickled(o: Operator) -> bytes:
    return pickle.dumps(Evil(o.canary("pickle")))


def torch_saved(o: Operator) -> bytes:
    """What ``torch.load`` would run."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(o.canary("torch"))))
        archive.writestr("archive/version", "3\n")
        archive.writestr("../../../../../../../../tmp/" + CANARY, "zip slip")
    return out.getvalue()


def header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def evil_files(o: Operator) -> dict[str, bytes]:
    """Files that are no weights, no update and no document."""
    names = json.loads(o.get(o.spec.manifest))["tensors"]
    first = names[0]["name"] if isinstance(names[0], dict) else names[0]
    whole = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    return {
        "empty": b"",
        "pickle": pickled(o),
        "torch": torch_saved(o),
        "endless header": struct.pack("<Q", 2**63) + b"{",
        "header over its cap": struct.pack("<Q", 2**31) + b" " * 1000,
        "deep header": struct.pack("<Q", 100_000) + b"[" * 100_000,
        "path as a name": header({"../../" + CANARY: whole}, b"\0" * 4),
        "absolute name": header({o.canary("name"): whole}, b"\0" * 4),
        "span outside": header({first: whole | {"data_offsets": [0, 2**50]}}, b"\0" * 4),
        "negative span": header({first: whole | {"data_offsets": [4, 0]}}, b"\0" * 4),
        "overflowing shape": header({first: whole | {"shape": [2**40, 2**40]}}, b"\0" * 4),
        "noise": hashlib.sha512(b"noise").digest() * 1000,
    }


FILES = (
    *("empty", "pickle", "torch", "endless header", "header over its cap", "deep header"),
    *("path as a name", "absolute name", "span outside", "negative span", "overflowing shape"),
    "noise",
)


# What the run is ----------------------------------------------------------------------------------


def config_with(**more: Any) -> Callable[[Operator], Signed]:
    """A signed run whose model's config holds these, too."""

    def make(o: Operator) -> Signed:
        text = json.dumps(o.config | more).replace("CANARY", o.canary("config"))
        return o.sign(o.spec.model_copy(update={"model": o.put(text.encode())}))

    return make


def document(name: str, data: Callable[[Operator], bytes]) -> Callable[[Operator], Signed]:
    """A signed run with another document."""
    return lambda o: o.sign(o.spec.model_copy(update={name: o.put(data(o))}))


def manifest_with(**tensor: Any) -> Callable[[Operator], Signed]:
    def make(o: Operator) -> bytes:
        whole = json.loads(o.get(o.spec.manifest))
        whole["tensors"][0] |= tensor
        return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()

    return document("manifest", make)


def corpus_with(**values: Any) -> Callable[[Operator], Signed]:
    def make(o: Operator) -> bytes:
        whole = json.loads(o.get(o.spec.corpus)) | values
        return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()

    return document("corpus", make)


def unsigned(o: Operator) -> Signed:
    return o.sign(o.spec).model_copy(update={"signature": "ab" * 50})


def by_a_stranger(o: Operator) -> Signed:
    return NodeKey.generate().sign("RunSpec", canonical_bytes(o.spec))


def of_another_kind(o: Operator) -> Signed:
    return o.site.coordinator.key.sign("RoundTask", canonical_bytes(o.spec))


BOMB = b'{"a":' * 50_000
REGEX = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}}
"""Tokenizers are the coordinator's: a node has token ids, and never sees one."""
RUNS: dict[str, Callable[[Operator], Signed]] = {
    "unsigned": unsigned,
    "signed by a stranger": by_a_stranger,
    "signed as another kind": of_another_kind,
    "auto_map": config_with(auto_map={"AutoModelForCausalLM": "evil.py--CANARY"}),
    "trust_remote_code": config_with(trust_remote_code=True),
    "nested auto_map": config_with(rope_parameters={"auto_map": {"AutoConfig": "evil.E"}}),
    "another repository": config_with(_name_or_path="../../evil", name_or_path="evil/evil"),
    "kernels": config_with(use_kernels=True, _attn_implementation="evil/kernel"),
    "quantizer": config_with(quantization_config={"quant_method": "evil"}),
    "unknown family": config_with(model_type="../../evil"),
    "endless layers": config_with(num_hidden_layers=2**30),
    "endless width": config_with(hidden_size=2**30, intermediate_size=2**30),
    "not finite": config_with(rms_norm_eps=1e400),
    "config is a pickle": document("model", pickled),
    "config is a bomb": document("model", lambda _: BOMB),
    "config is long": document("model", lambda _: b" " * (2 * MIB)),
    "manifest is a pickle": document("manifest", pickled),
    "manifest is a bomb": document("manifest", lambda _: BOMB),
    "manifest names a path": manifest_with(name="../../../" + CANARY),
    "manifest names the root": manifest_with(name="/tmp/" + CANARY),
    "manifest with NUL": manifest_with(name="a\0b"),
    "manifest of huge shapes": manifest_with(shape=[2**40, 2**40]),
    "manifest of negative shapes": manifest_with(shape=[-1, 64]),
    "manifest of strange dtypes": manifest_with(dtype="object"),
    "corpus is a pickle": document("corpus", pickled),
    "corpus of huge blocks": corpus_with(block_tokens=2**40),
    "corpus of endless blocks": corpus_with(block_count=2**40),
    "corpus of a nasty tokenizer": corpus_with(tokenizer={"kind": "hf", **REGEX}),
    "corpus of executable sources": corpus_with(sources=["hf:../../evil\n$(touch CANARY)"]),
    "a document over its cap": lambda o: o.sign(
        o.spec.model_copy(
            update={"model": ArtifactRef(digest="a" * 64, size_bytes=2**36)},
        )
    ),
    "a document that is not there": lambda o: o.sign(
        o.spec.model_copy(update={"model": ArtifactRef(digest="b" * 64, size_bytes=100)})
    ),
}
CONFIGS = (
    *("auto_map", "trust_remote_code", "nested auto_map", "another repository", "kernels"),
    *("quantizer", "unknown family", "endless layers", "endless width", "not finite"),
    *("config is a pickle", "config is a bomb", "config is long"),
)
CODES = dict.fromkeys(CONFIGS, "config-refused") | {
    "unsigned": "bad-signature",
    "signed by a stranger": "bad-signature",
    "signed as another kind": "wrong-kind",
    "manifest names a path": "manifest-mismatch",
    "manifest names the root": "manifest-mismatch",
    "a document over its cap": "protocol",
    "a document that is not there": "unknown-artifact",
}
"""All others are malformed."""
BELIEVED = {"chat template": config_with(chat_template="{{ cycler.__init__.__globals__.os }}")}


@pytest.mark.parametrize("attack", RUNS)
def test_a_run_is_refused_that_is(attack: str, operator: Operator, desk: HostileDesk) -> None:
    desk.spec = RUNS[attack](operator)
    assert operator.refused("prepare") == CODES.get(attack, "malformed")


def test_a_chat_template_in_a_config_is_text_that_nobody_renders(
    operator: Operator, desk: HostileDesk
) -> None:
    desk.spec = BELIEVED["chat template"](operator)
    operator.ask("prepare")


def test_another_run_than_the_one_that_was_joined_is_refused(
    operator: Operator, desk: HostileDesk
) -> None:
    operator.ask("prepare")
    operator.ask("restart")
    desk.spec = operator.sign(operator.spec.model_copy(update={"seed": 999}))
    assert operator.refused("prepare") == "other-run"


# What is asked ------------------------------------------------------------------------------------


def shifted(o: Operator, **changes: Any) -> RoundTask:
    return o.task().model_copy(update=changes)


def leased(o: Operator, **changes: Any) -> RoundTask:
    task = o.task()
    return task.model_copy(update={"lease": task.lease.model_copy(update=changes)})


def based(o: Operator, **changes: Any) -> RoundTask:
    task = o.task()
    return task.model_copy(update={"base": task.base.model_copy(update=changes)})


TASKS: dict[str, tuple[Callable[[Operator], RoundTask], str]] = {
    "for another run": (lambda o: shifted(o, run_id="other-run"), "wrong-task"),
    "whose lease is for another run": (lambda o: leased(o, run_id="other-run"), "wrong-task"),
    "for another node": (lambda o: leased(o, node_id="0123456789abcdef"), "wrong-task"),
    "for two rounds": (lambda o: leased(o, round=99), "wrong-task"),
    "of blocks that there are not": (
        lambda o: leased(
            o, blocks=tuple(b.model_copy(update={"block": 2**25}) for b in o.task().lease.blocks)
        ),
        "malformed",
    ),
    "of other tokens than its blocks": (lambda o: leased(o, tokens=2**40), "malformed"),
    "that has expired": (lambda o: shifted(o, expires_unix=time.time() - YEAR), "stale"),
    "from the future": (lambda o: shifted(o, issued_unix=time.time() + YEAR), "from-the-future"),
    "that begins after its round": (
        lambda o: shifted(o, round=1, lease=leased(o, round=1).lease, base=whole(o, 5)),
        "forked",
    ),
}


def whole(o: Operator, version: int, **changes: Any) -> VersionRef:
    """A version as a checkpoint, whatever is in it."""
    made: dict[str, Any] = {
        "version": version,
        "weights_digest": "e" * 64,
        "checkpoint_version": version,
        "checkpoint": o.task().base.checkpoint,
        "updates_from": version,
        "updates": (),
    }
    return VersionRef.model_validate(made | changes)


@pytest.mark.parametrize("attack", TASKS)
def test_a_task_is_refused(attack: str, operator: Operator, desk: HostileDesk) -> None:
    make, code = TASKS[attack]
    assert operator.refused("execute", signed=as_json(operator.sign(make(operator)))) == code


def test_a_task_is_refused_that_nobody_or_somebody_else_signed(
    operator: Operator, desk: HostileDesk
) -> None:
    task = operator.task()
    signed = operator.sign(task)
    forged = (
        signed.model_copy(update={"signature": "ab" * 50}),
        signed.model_copy(update={"body": signed.body.replace('"attempt":0', '"attempt":1')}),
        NodeKey.generate().sign("RoundTask", canonical_bytes(task)),
        operator.site.coordinator.key.sign("Head", canonical_bytes(task)),
    )
    codes = {operator.refused("execute", signed=as_json(one)) for one in forged}
    assert codes <= {"bad-signature", "wrong-kind"}
    spaced = signed.body.replace(",", ", ", 1).encode()
    key = operator.site.coordinator.key
    assert operator.refused("execute", signed=as_json(key.sign("RoundTask", spaced))) == (
        "not-canonical"
    )
    long = key.sign("RoundTask", b" " * (MAX_CONTROL_MESSAGE + 1))
    assert operator.refused("execute", signed=as_json(long)) in ("too-large", "malformed")


def test_a_task_that_was_done_is_not_done_again_and_an_older_one_never(
    operator: Operator, desk: HostileDesk
) -> None:
    first = operator.sign(operator.task())
    assert operator.ask("execute", signed=as_json(first))["ok"]["accepted"]
    again = operator.ask("execute", signed=as_json(first))["ok"]
    assert again["code"] == "settled"
    operator.site.publish()
    second = operator.sign(operator.task())
    assert operator.ask("execute", signed=as_json(second))["ok"]["accepted"]
    assert operator.refused("execute", signed=as_json(first)) == "replayed-task"
    operator.site.publish()


# What is published --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("way", ["update", "checkpoint"])
def test_what_is_no_model_is_refused_as_an_update_and_as_a_checkpoint(
    way: str, what: str, operator: Operator, desk: HostileDesk
) -> None:
    data = evil_files(operator)[what]
    task = operator.task()
    held = operator.site.version_ref()
    if way == "checkpoint":
        base = whole(operator, held.version + 1, checkpoint=operator.put(data))
    else:
        base = whole(
            operator,
            held.version + 1,
            checkpoint_version=held.version,
            updates_from=held.version,
            updates=(operator.put(data),),
        )
    ahead = {"round": base.version + 1}
    told = task.model_copy(
        update={**ahead, "base": base, "lease": task.lease.model_copy(update=ahead)}
    )
    code = operator.refused("execute", signed=as_json(operator.sign(told)))
    assert code == {"update": "payload-malformed", "checkpoint": "weights-malformed"}[way]


def test_a_bomb_in_an_update_is_refused_before_it_is_unpacked(
    operator: Operator, desk: HostileDesk
) -> None:
    import zstandard

    held = operator.site.version_ref()
    honest = held.updates[-1]
    data = operator.get(honest)
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    start = 8 + length
    name = max(
        (n for n in entries if n != "__metadata__"), key=lambda n: entries[n]["data_offsets"][1]
    )
    first, last = entries[name]["data_offsets"]
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(256 * MIB))
    entries[name] |= {"data_offsets": [first, first + len(bomb)], "shape": [len(bomb)]}
    packed = data[start : start + first] + bomb
    base = whole(
        operator,
        held.version + 1,
        checkpoint_version=held.version,
        updates_from=held.version,
        updates=(operator.put(header(entries, packed)),),
    )
    task = operator.task()
    ahead = {"round": base.version + 1}
    told = task.model_copy(
        update={**ahead, "base": base, "lease": task.lease.model_copy(update=ahead)}
    )
    assert last > first
    before = peak_bytes(operator)
    code = operator.refused("execute", signed=as_json(operator.sign(told)))
    assert code == "payload-malformed"
    assert peak_bytes(operator) - before < 128 * MIB


def peak_bytes(o: Operator) -> int:
    """The most memory that any of the node's processes ever held."""
    import psutil

    peak = 0
    for process in psutil.Process(o.driver.pid).children(recursive=True):
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    return peak


def test_weights_other_than_announced_are_not_trained_from(
    operator: Operator, desk: HostileDesk
) -> None:
    held = operator.site.version_ref()
    task = operator.task()
    base = whole(operator, held.version, weights_digest="d" * 64)
    told = task.model_copy(update={"base": base})
    assert operator.refused("execute", signed=as_json(operator.sign(told))) == "replica-differs"


def test_a_download_that_never_ends_is_ended(operator: Operator, desk: HostileDesk) -> None:
    sent = [0]

    class Endless(transfer_pb2_grpc.TransferServicer):
        def Fetch(self, request: Any, context: Any) -> Iterator[FetchChunk]:  # noqa: N802
            while context.is_active():
                sent[0] += 1
                yield FetchChunk(data=bytes(TRANSFER_CHUNK))

    coordinator = operator.site.coordinator
    tls = coordinator.state.tls
    server = grpc.server(futures.ThreadPoolExecutor(4))
    transfer_pb2_grpc.add_TransferServicer_to_server(Endless(), server)
    credentials = grpc.ssl_server_credentials(
        [((tls / "server.key").read_bytes(), (tls / "server.pem").read_bytes())],
        coordinator.ca_pem,
        require_client_auth=True,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    operator.ports.append(port)
    server.start()
    try:
        ref = {"digest": "c" * 64, "size_bytes": 3 * MIB}
        operator.refused("fetch", port=port, ref=ref)
    finally:
        server.stop(0).wait()
    # What is in flight when the node hangs up is a window's worth.
    assert sent[0] < 100
    assert not list(operator.home.store.glob("cc/*"))


# What is said -------------------------------------------------------------------------------------


def head(o: Operator, **changes: Any) -> Callable[[NodeReportReply], NodeReportReply]:
    """Report's answer with another signed head."""

    def change(reply: NodeReportReply) -> NodeReportReply:
        honest = parse(Head, reply.head.body.encode())
        return reply.model_copy(update={"head": o.sign(honest.model_copy(update=changes))})

    return change


def test_heads_that_are_stale_forked_rolled_back_or_of_another_run_are_refused(
    operator: Operator, desk: HostileDesk
) -> None:
    assert "ok" in operator.ask("report")
    now = time.time()
    lies: dict[str, dict[str, Any]] = {
        "stale": {"issued_unix": now - YEAR, "expires_unix": now - YEAR + 600},
        "from-the-future": {"issued_unix": now + YEAR, "expires_unix": now + YEAR + 600},
        "wrong-run": {"run_id": "another-run"},
        "forked": {"weights_digest": "f" * 64},
        "rolled-back": {"version": 0},
    }
    for code, changes in lies.items():
        desk.reply = head(operator, **changes)
        assert operator.refused("report") == code
    desk.reply = lambda reply: reply.model_copy(
        update={"head": reply.head.model_copy(update={"signature": "ab" * 50})}
    )
    assert operator.refused("report") == "bad-signature"
    desk.reply = head(operator, generation=7)
    assert "ok" in operator.ask("report")
    desk.reply = head(operator, generation=6)
    assert operator.refused("report") == "rolled-back"


def test_whatever_pace_it_asks_for_a_node_keeps_its_own(
    operator: Operator, desk: HostileDesk
) -> None:
    for wanted in (0.0, 1e300):
        desk.reply = lambda reply, wanted=wanted: reply.model_copy(  # type: ignore[misc]
            update={"report_seconds": wanted, "poll_seconds": wanted}
        )
        reply = operator.ask("report")["ok"]
        for pace in (reply["report_seconds"], reply["poll_seconds"]):
            assert MIN_WAIT_SECONDS <= pace <= MAX_WAIT_SECONDS


def test_what_it_says_reaches_the_volunteers_terminal_as_text_and_nothing_else(
    operator: Operator, desk: HostileDesk
) -> None:
    words = "\x1b]0;pwned\x07\x1b[2J\nerror: all is lost\r\u202e"
    desk.verdict = Verdict(accepted=False, code="late", sentence=words)
    verdict = operator.ask("execute", signed=as_json(operator.sign(operator.task())))["ok"]
    assert verdict["sentence"] == words
    said = operator.ask("said")["ok"]
    assert any("error: all is lost" in line for line in said)
    assert all(line.isprintable() for line in said)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://user:word@host/", "ftp://host/x", "http://a/$(id)`id`|x"]
)
def test_a_mirror_that_is_no_mirror_is_not_asked(
    url: str, operator: Operator, desk: HostileDesk
) -> None:
    body = canonical_bytes(
        MirrorList.model_construct(
            run_id=operator.spec.run_id, urls=(url,), issued_unix=time.time()
        )
    )
    desk.list_of_mirrors = operator.site.coordinator.key.sign("MirrorList", body)
    operator.ask("prepare")  # asks for mirrors, and does without


# Afterwards ---------------------------------------------------------------------------------------


def test_after_all_that_the_node_does_honest_work_as_before(
    operator: Operator, desk: HostileDesk
) -> None:
    assert operator.ask("execute", signed=as_json(operator.sign(operator.task())))["ok"]["accepted"]


def test_nothing_was_executed_unpickled_or_written_outside_the_nodes_directories(
    operator: Operator,
) -> None:
    assert operator.driver.stdin is not None
    operator.driver.stdin.close()
    assert operator.driver.wait(60) == 0
    assert list(operator.canaries.iterdir()) == []
    root = operator.watched.parent
    below = [operator.home.root, root / "tmp"]
    acts = list(by_hook(operator.watched))
    assert {act.kind for act in acts} >= {"write", "import", "code", "run"}, "the hook saw little"
    assert not_due(acts, below=below, ports=operator.ports) == {}
    if operator.kernel is not None:
        seen = list(by_kernel(operator.kernel))
        assert {act.kind for act in seen} >= {"write", "run", "connect"}, "strace saw little"
        may = [*below, operator.watched]
        assert not_due(seen, below=may, ports=operator.ports) == {}
    assert list((root / "user").iterdir()) == []
    assert list((root / "cwd").iterdir()) == []
