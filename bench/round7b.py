"""``make bench-7b``: one whole round at 7.0e9 parameters, through the real parts.

    make bench-7b                             7.0e9 parameters: 76 GB of free disk, 4 GB of memory
    make bench-7b ARGS="--parameters 3e8"     a smaller model of the same make

Eight nodes encode a contribution (noise, by the real encoder), sign it, push it over mTLS on
loopback and submit it; the coordinator verifies signature and payload, aggregates, and publishes;
a node fetches the update, applies it and must come to the same digest. Every step runs in a process
of its own, whose time and peak of anonymous memory go into ``runs/bench/round7b.json`` as soon as
they are known. Nodes work one after another: on this machine they would only share its cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.child import ROOT, ChildResult, memory_of, run_child
from talkoot.protocol.errors import CapacityError, TalkootError
from talkoot.protocol.manifest import Manifest, TensorSpec
from talkoot.protocol.messages import CodecSpec

NODES: Final = 8
UPLINK: Final = CodecSpec(chunk=4096, keep=64, value_bits=2)
DOWNLINK: Final = CodecSpec(chunk=4096, keep=256, value_bits=4)
RUN: Final = "bench-7b"
BASE: Final = "0" * 64
RAW_SHARE: Final = 0.05
"""Of the state, that is copied raw for comparison: all of it would not fit beside it."""
SLACK: Final = 1 << 30
"""Bytes that must stay free."""


def manifest_for(parameters: int) -> Manifest:
    """A Llama-like model of nearly as many parameters: layers first, the vocabulary fills up."""
    hidden, mlp = (4096, 11008) if parameters >= 2e9 else (1024, 2816)
    layer = 4 * hidden * hidden + 3 * hidden * mlp + 2 * hidden
    layers = max(1, int(0.93 * parameters / layer))
    vocabulary = max(256, (parameters - layers * layer - hidden) // (2 * hidden))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        prefix = f"model.layers.{number}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (mlp, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, mlp)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return Manifest(
        tensors=tuple(TensorSpec(name=n, shape=s, dtype="bfloat16") for n, s in shapes.items())
    )


def room_for(manifest: Manifest) -> int:
    """Bytes of disk that a round takes at its fullest."""
    dense = sum(spec.size_bytes for spec in manifest.tensors)
    up, down = 0.150 / 8 * manifest.parameters, 0.62 / 8 * manifest.parameters
    # Published before and after, feedback, the node's new replica; payloads; the update, thrice.
    return int(3 * dense + 4 * manifest.parameters + (NODES + 1) * up + 3 * down) + SLACK


# What each process does ------------------------------------------------------------------------


def _manifest(root: Path) -> Manifest:
    return Manifest.from_bytes((root / "manifest.json").read_bytes())


def _noise(seed: int) -> Any:
    """(2**24,) fp32, Gaussian: every section is a window of it, at its own place and size."""
    import torch

    return torch.randn(1 << 24, generator=torch.Generator().manual_seed(seed))


def _windows(spec: TensorSpec, noise: Any, seed: int) -> Iterator[tuple[int, int, Any]]:
    """(first element, number, values) of a tensor's sections."""
    for start in range(0, spec.numel, 1 << 20):
        count = min(1 << 20, spec.numel - start)
        at = zlib.crc32(f"{spec.name} {start} {seed}".encode()) % (noise.numel() - count)
        yield start, count, noise[at : at + count]


def make_weights(root: str) -> dict[str, Any]:
    """Version 0."""
    import torch

    from talkoot.server.aggregate import VersionDir, initial_state

    directory = Path(root)
    manifest, noise = _manifest(directory), _noise(1)

    def get(name: str) -> torch.Tensor:
        spec = manifest.spec(name)
        flat = torch.empty(spec.numel, dtype=torch.bfloat16)
        for start, count, values in _windows(spec, noise, 0):
            flat[start : start + count] = values * 0.02
        return flat.view(spec.shape)

    began = time.perf_counter()
    initial_state(manifest, get, directory / "v0")
    times = {"setup": time.perf_counter() - began}
    return {"stages": times, "bytes": VersionDir(directory / "v0").published.stat().st_size}


def contribute(root: str, number: int, address: str) -> dict[str, Any]:
    """One node: encode, sign, push, submit."""
    import torch

    from bench.plane import client_of
    from talkoot.client.pace import Meter, TransferOptions
    from talkoot.protocol.codec import EncodedTensor, encode_with_feedback
    from talkoot.protocol.identity import NodeKey
    from talkoot.protocol.ingest import sha256_file
    from talkoot.protocol.messages import ArtifactRef, Contribution, canonical_bytes
    from talkoot.protocol.payload import write_payload

    directory = Path(root)
    manifest, noise = _manifest(directory), _noise(100 + number)
    identity = directory / f"node{number}"
    key = NodeKey.load(identity / "node.key")
    lease_id = f"{number:032x}"
    path = identity / "payload"

    def encoded() -> Iterator[tuple[str, EncodedTensor]]:
        for spec in manifest.tensors:
            delta = torch.empty(spec.numel)
            for start, count, values in _windows(spec, noise, number):
                torch.mul(values, 1e-3, out=delta[start : start + count])
            yield spec.name, encode_with_feedback(delta, None, UPLINK, 1.0, workers=2)[0]

    times = {}
    began = time.perf_counter()
    write_payload(path, manifest, UPLINK, encoded(), {"lease": lease_id})
    times["encode"], began = time.perf_counter() - began, time.perf_counter()
    digest, size = sha256_file(path)
    claim = Contribution(
        run_id=RUN,
        round=1,
        lease_id=lease_id,
        node_id=key.node_id,
        base_weights_digest=BASE,
        payload=ArtifactRef(digest=digest, size_bytes=size),
        tokens=1_000_000 + number,
        steps=15,
        loss=2.5,
        training_seconds=60.0,
    )
    signed = key.sign("Contribution", canonical_bytes(claim))
    times["hash and sign"], began = time.perf_counter() - began, time.perf_counter()
    options = replace(TransferOptions(), judge_seconds=3600.0)
    with client_of(identity, address, Meter(), options) as client:
        client.push(lease_id, claim.payload, path)
        times["push"], began = time.perf_counter() - began, time.perf_counter()
        verdict = client.submit(signed)
        times["submit and verify"] = time.perf_counter() - began
    if not verdict.accepted:
        raise RuntimeError(verdict.sentence)
    path.unlink()
    return {"stages": times, "bytes": size}


def aggregate(root: str) -> dict[str, Any]:
    """The coordinator: aggregate, publish."""
    from talkoot.protocol.artifacts import ArtifactStore
    from talkoot.server.aggregate import ContributionInput, VersionDir, aggregate_round
    from talkoot.server.outer import OuterSpec

    directory = Path(root)
    store = ArtifactStore(directory / "server")
    accepted = [json.loads(line) for line in (directory / "accepted").read_text().splitlines()]
    parts = [
        ContributionInput(store.path(one["digest"]), one["tokens"], one["l2_norm"], one["node_id"])
        for one in accepted
    ]
    began = time.perf_counter()
    result = aggregate_round(
        _manifest(directory),
        VersionDir(directory / "v0"),
        parts,
        UPLINK,
        DOWNLINK,
        OuterSpec(),
        directory / "v1",
        workers=2,
    )
    times, began = {"aggregate": time.perf_counter() - began}, time.perf_counter()
    store.put_file(result.update_path, verified=result.update_digest)
    times["publish"] = time.perf_counter() - began
    return {
        "stages": times,
        "bytes": result.update_size_bytes,
        "digest": result.update_digest,
        "weights_digest": result.weights_digest,
        "bits_per_parameter": result.bits_per_parameter,
        "threads": result.seconds,
        "contributions": len(parts),
    }


def raw_copy(root: str, share: float) -> dict[str, Any]:
    """A share of the state bytes that aggregation reads and writes, read and written raw: through
    the page cache and past it. The faster of the two counts."""
    ways = {"page cache": _copied(root, share, past=False), "past it": _copied(root, share, True)}
    seconds, moved = min(ways.values())
    told = {f"raw copy, {way}, scaled": took / share for way, (took, _) in ways.items()}
    return {"stages": {"raw copy, scaled": seconds / share} | told, "bytes": int(moved / share)}


def _copied(root: str, share: float, past: bool) -> tuple[float, int]:
    """Seconds and bytes."""
    import numpy as np

    from talkoot.protocol.direct import BLOCK, PastCache, congruent
    from talkoot.server.aggregate import VersionDir

    directory = Path(root)
    old, new = VersionDir(directory / "v0"), VersionDir(directory / "v1")
    room = np.empty((4 << 20) + BLOCK, dtype=np.uint8)
    block = congruent(room, 4 << 20, 0 if past else 1)  # at 1 nothing fits: the usual way
    moved, began = 0, time.perf_counter()
    # Each way reads another end of the file, which the other one has not brought into the cache.
    start = 0 if past else old.published.stat().st_size // 2 // BLOCK * BLOCK
    with (
        old.published.open("rb", buffering=0) as file,
        PastCache(file.fileno(), os.O_RDONLY) as disk,
    ):
        for _ in range(int(share * old.published.stat().st_size / block.size)):
            moved += disk.read(block, start + moved)
    written = sum(path.stat().st_size for path in (new.published, new.feedback_path))
    left = int(share * written)
    while left > 0:  # in files of 512 MiB, so that it takes little room
        target = directory / "raw"
        with target.open("wb", buffering=0) as out, PastCache(out.fileno(), os.O_WRONLY) as disk:
            for number in range(min(128, -(-left // block.size))):
                disk.write(block, number * block.size)
                moved, left = moved + block.size, left - block.size
            os.fsync(out.fileno())
        target.unlink()
    return time.perf_counter() - began, moved


def apply(root: str, address: str, digest: str, size: int) -> dict[str, Any]:
    """A node: fetch the update, apply it to its replica."""
    from bench.plane import client_of
    from talkoot.client.pace import Meter
    from talkoot.protocol.artifacts import ArtifactStore
    from talkoot.protocol.messages import ArtifactRef
    from talkoot.protocol.weights import apply_update
    from talkoot.server.aggregate import VersionDir

    directory = Path(root)
    began = time.perf_counter()
    with client_of(directory / "node0", address, Meter()) as client:
        ref = ArtifactRef(digest=digest, size_bytes=size)
        update = client.fetch(ref, ArtifactStore(directory / "node0" / "store"))
    times, began = {"fetch": time.perf_counter() - began}, time.perf_counter()
    old = VersionDir(directory / "v0").published  # the node's replica before: the same bytes
    out = directory / "node0" / "published.safetensors"
    found = apply_update(_manifest(directory), old, update, DOWNLINK, out, workers=2)
    times["apply"] = time.perf_counter() - began
    return {"stages": times, "bytes": size, "weights_digest": found}


# The transfer service --------------------------------------------------------------------------


def make_identities(root: Path) -> None:
    """A CA, the server's certificate, and one identity a node; what the server knows of them."""
    from tests.data_plane import Authority

    from bench.plane import SERVER_NAME
    from talkoot.protocol.identity import NodeKey, public_pem

    authority = Authority()
    key, certificate = authority.issue(SERVER_NAME, san=SERVER_NAME)
    (root / "ca.pem").write_bytes(authority.pem)
    (root / "server.key").write_bytes(key)
    (root / "server.pem").write_bytes(certificate)
    known = {}
    for number in range(NODES):
        home = root / f"node{number}"
        home.mkdir()
        node = NodeKey.generate()
        (home / "ca.pem").write_bytes(authority.pem)
        (home / "node.key").write_bytes(node.private_pem())
        (home / "node.pem").write_bytes(authority.certify(node.node_id, node.public_key))
        known[node.node_id] = [f"{number:032x}", public_pem(node.public_key).decode()]
    (root / "nodes.json").write_text(json.dumps(known))


def serve_until_told(root: Path) -> None:
    """The transfer service, with a backend that verifies as the coordinator's desk does."""
    from tests.data_plane import Shelf

    from talkoot.protocol.artifacts import ArtifactStore
    from talkoot.protocol.identity import load_public_key, verify
    from talkoot.protocol.messages import Contribution, Signed, Verdict
    from talkoot.server.sketch import examine
    from talkoot.server.transfer import serve

    importlib.import_module("talkoot.protocol.payload")  # torch, before anybody waits for it
    known = json.loads((root / "nodes.json").read_text())
    manifest = _manifest(root)

    class Backend(Shelf):
        def submit(self, node_id: str, signed: Signed) -> Verdict:
            public = load_public_key(known[node_id][1].encode())
            claim = verify(signed, "Contribution", public, Contribution)
            path = self.store.path(claim.payload.digest)
            found = examine(path, manifest, UPLINK, b"a secret of the coordinator's own")
            row = {"digest": claim.payload.digest, "node_id": node_id, "tokens": claim.tokens}
            with (root / "accepted").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"l2_norm": found.l2_norm}) + "\n")
            return Verdict(accepted=True, code="accepted", sentence="")

    leases = {lease: node_id for node_id, (lease, _) in known.items()}
    shelf = Backend(ArtifactStore(root / "server"), leases=leases)
    key, pem, ca = ((root / name).read_bytes() for name in ("server.key", "server.pem", "ca.pem"))
    server = serve(shelf, "127.0.0.1:0", key, pem, ca, max_workers=16)
    print(server.port, flush=True)
    sys.stdin.read()
    server.stop(0)


# The whole ------------------------------------------------------------------------------------


class Server:
    """The transfer service's process; ``peak`` is its anonymous memory so far."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "bench.round7b", "--serve", str(root)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"
        self.peak = 0
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while self._process.poll() is None:
            self.peak = max(self.peak, memory_of(self._process.pid)[0])
            time.sleep(0.01)

    def stop(self) -> None:
        """Its input ends, and so does it."""
        self._process.communicate()
        self._watcher.join()


class Report:
    """What was measured so far, on the disk and in a table."""

    def __init__(self, path: Path, manifest: Manifest, console: Console) -> None:
        self._path = path
        self._console = console
        self.data: dict[str, Any] = {
            "parameters": manifest.parameters,
            "tensors": len(manifest.tensors),
            "nodes": NODES,
            "began": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            "load_average": os.getloadavg(),
            "steps": [],
        }

    def add(self, who: str, child: ChildResult) -> None:
        """One process's work."""
        result = child.result
        step = {
            "who": who,
            "stages": result["stages"],
            "bytes": result["bytes"],
            "peak_anonymous": child.peak_anonymous,
            "peak_resident": child.peak_resident,
        }
        self.data["steps"].append(step)
        self.save()
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in step["stages"].items())
        self._console.print(f"  {who}: {told}; {child.peak_anonymous / 1e6:.0f} MB")

    def save(self) -> None:
        """Write it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """A row a stage: seconds of all processes that did it, their largest peak, bytes."""
        table = Table("stage", "times", "seconds in all", "peak RSS of a process", "bytes")
        rows: dict[str, list[tuple[float, int, int]]] = {}
        for step in self.data["steps"]:
            for stage, seconds in step["stages"].items():
                rows.setdefault(stage, []).append((seconds, step["peak_anonymous"], step["bytes"]))
        for stage, found in rows.items():
            table.add_row(
                stage,
                str(len(found)),
                f"{sum(row[0] for row in found):.1f}",
                f"{max(row[1] for row in found) / 1e6:.0f} MB",
                f"{sum(row[2] for row in found) / 1e6:,.1f} MB",
            )
        return table


def whole_round(root: Path, manifest: Manifest, report: Report) -> None:
    """Do it, in ``root``."""
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    make_identities(root)
    arguments = {"root": str(root)}
    made = run_child("bench.round7b:make_weights", arguments, timeout=36_000)
    report.add("version 0", made)
    server = Server(root)
    began = time.perf_counter()
    try:
        for number in range(NODES):
            work = arguments | {"number": number, "address": server.address}
            child = run_child("bench.round7b:contribute", work, timeout=36_000)
            report.add(f"node {number}", child)
        published = run_child("bench.round7b:aggregate", arguments, timeout=36_000)
        report.add("coordinator", published)
        report.data["aggregation"] = published.result
        raw = run_child("bench.round7b:raw_copy", arguments | {"share": RAW_SHARE}, timeout=36_000)
        report.add("raw copy", raw)
        update = {"digest": published.result["digest"], "size": published.result["bytes"]}
        work = arguments | {"address": server.address} | update
        applied = run_child("bench.round7b:apply", work, timeout=36_000)
        report.add("node 0 applies", applied)
    finally:
        server.stop()
    report.data["round_seconds"] = time.perf_counter() - began
    report.data["transfer_service_peak_anonymous"] = server.peak
    report.data["same_weights"] = (
        applied.result["weights_digest"] == published.result["weights_digest"]
    )
    report.save()
    if not report.data["same_weights"]:
        raise RuntimeError("The node's weights are not the coordinator's.")


def insist_on_room(manifest: Manifest, where: Path) -> None:
    """Raise :class:`CapacityError` unless a round of this size fits on the disk of ``where``."""
    free, needed = shutil.disk_usage(where).free, room_for(manifest)
    if free < needed:
        fits = int((free - SLACK) / ((needed - SLACK) / manifest.parameters))
        raise CapacityError(
            f"A round at {manifest.parameters / 1e9:.2f}e9 parameters needs {needed / 1e9:.1f} GB "
            f"of disk and {where} has {free / 1e9:.1f} GB: free some, name another --scratch, or "
            f"try --parameters {max(fits, 0) * 0.98:.2g}.",
            code="no-room",
        )


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.round7b", description="A whole round.")
    parser.add_argument("--parameters", type=float, default=7.0e9, help="of the model")
    parser.add_argument("--scratch", type=Path, default=None, help="directory on the disk to use")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where results go")
    parser.add_argument("--serve", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve_until_told(args.serve)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    base: Path = args.scratch or args.out
    try:
        if args.parameters < 1e6:
            raise CapacityError("--parameters is 1e6 at least.", code="too-small")
        manifest = manifest_for(int(args.parameters))
        base.mkdir(parents=True, exist_ok=True)
        insist_on_room(manifest, base)
        console.print(f"{manifest.parameters:,} parameters in {len(manifest.tensors)} tensors")
        report = Report(args.out / "round7b.json", manifest, console)
        root = Path(tempfile.mkdtemp(prefix=".round7b-", dir=base.absolute()))
        try:
            whole_round(root, manifest, report)
        finally:
            shutil.rmtree(root, ignore_errors=True)
    except TalkootError as err:
        print(f"error: {err.sentence}", file=sys.stderr)
        return 1
    console.print(report.table())
    console.print(
        f"whole round {report.data['round_seconds']:.0f} s; transfer service, with verification, "
        f"{report.data['transfer_service_peak_anonymous'] / 1e6:.0f} MB at its peak; "
        f"{report.data['aggregation']['bits_per_parameter']:.3f} bit a parameter down"
    )
    console.print(str(args.out / "round7b.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
