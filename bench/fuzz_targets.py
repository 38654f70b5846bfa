"""What reads bytes from outside, as functions of bytes, each with valid inputs to begin from.

A target may raise a :class:`TalkootError` (``FUZZ`` holds it against the input); any other
exception, a hang, or more memory than the limit is a finding. Targets use public functions only.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import zstandard

from talkoot.protocol import corpus as corpus_module
from talkoot.protocol import limits
from talkoot.protocol import manifest as manifest_module
from talkoot.protocol import messages as messages_module
from talkoot.protocol.errors import ProtocolError, RefusedError
from talkoot.protocol.messages import (
    ArtifactRef,
    CodecSpec,
    EnrolReply,
    EnrolRequest,
    Message,
    RenewReply,
    Signed,
    canonical_bytes,
    parse,
)

Run = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: stable; the key in ``fuzz.json``.
        run: reads an input.
        seeds: valid inputs (a mutation of one passes more checks than noise does).
        kind: how to mutate: ``bytes``, ``json``, ``safetensors`` or ``http``.
        weight: its share of the inputs; slow parsers get less.
    """

    name: str
    run: Run
    seeds: Sequence[bytes]
    kind: Literal["bytes", "json", "safetensors", "http"] = "bytes"
    weight: float = 1.0
    close: Callable[[], object] = field(default=lambda: None)


# Examples of messages ----------------------------------------------------------------------


def _bounds(metadata: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        for name in ("ge", "gt", "le", "pattern", "min_length"):
            value = getattr(item, name, None)
            if value is not None:
                found[name] = value
        found |= _bounds(getattr(item, "metadata", ()))
    return found


_TEXTS: Final = ("0" * 64, "0" * 32, "0" * 16, "x", "A", "0", "https://mirror.example/files", "a.b")
"""One of these fits each pattern that a message has."""


def _value(kind: Any, metadata: Sequence[Any] = ()) -> Any:
    """A small valid value of an annotation."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _value(get_args(kind)[0], (*metadata, *get_args(kind)[1:]))
    if origin is Literal:
        return get_args(kind)[0]
    if origin in (Union, types.UnionType):
        return _value(next(a for a in get_args(kind) if a is not type(None)), metadata)
    if origin is tuple:
        return (_value(get_args(kind)[0]),)
    if isinstance(kind, type) and issubclass(kind, Message):
        return example(kind)
    bounds = _bounds(metadata)
    if kind is bool:
        return True
    if kind is int:
        return max(bounds.get("ge", 0), min(3, bounds.get("le", 3)))
    if kind is float:
        return max(bounds.get("ge", 0.0), min(0.5, bounds.get("le", 0.5)))
    if kind is str and "pattern" in bounds:
        return next(text for text in _TEXTS if re.search(bounds["pattern"], text))
    if kind is str:
        return "x" * max(1, bounds.get("min_length", 1))
    raise TypeError(f"no example of {kind}")


_SPECIAL: Final[dict[str, dict[str, Any]]] = {
    "VersionRef": {"version": 3, "checkpoint_version": 2, "updates_from": 2},
    "CorpusManifest": {
        "block_tokens": 4,
        "block_count": 3,
        "tokens": 12,
        "heldout_tokens": 5,
        "dropped_tokens": 1,
        "total_tokens": 18,
        "blocks_index": ArtifactRef(digest="0" * 64, size_bytes=96),
        "tokenizer": corpus_module.TokenizerSpec(
            kind="bytes", vocab_size=300, eos_id=256, digest=None
        ),
    },
}


def example(kind: type[Message]) -> Any:
    """A small valid message."""
    values = {
        name: _value(info.annotation, info.metadata) for name, info in kind.model_fields.items()
    }
    return kind(**(values | _SPECIAL.get(kind.__name__, {})))


def message_kinds() -> list[type[Message]]:
    """Every message of the protocol."""
    found = []
    for module in (messages_module, manifest_module, corpus_module):
        for kind in vars(module).values():
            if (
                isinstance(kind, type)
                and issubclass(kind, Message)
                and kind is not Message
                and kind.__module__ == module.__name__
            ):
                found.append(kind)
    return found


# Codec, payloads, weights ------------------------------------------------------------------

_SHAPES: Final = ((40, 50), (3000,), (7,), (2, 3, 4))
_SPECS: Final = (
    CodecSpec(chunk=256, keep=8, value_bits=2),
    CodecSpec(chunk=64, keep=64, value_bits=5),
    CodecSpec(kind="dense"),
)


def _bomb(size: int) -> bytes:
    """A zstd frame of a few bytes that inflates to ``size`` zeros."""
    return zstandard.ZstdCompressor(level=19).compress(bytes(size))


def _read(
    data: bytes, numel: int, spec: CodecSpec, *, compiled: bool
) -> tuple[bytes, bytes] | ProtocolError:
    """Positions and values, or what was said of them."""
    from talkoot.protocol.codec import EncodedTensor, decode_tensor
    from talkoot.protocol.kernels import KERNELS

    with KERNELS.running(compiled=compiled):
        try:
            found = decode_tensor(EncodedTensor.from_bytes(data, numel, spec), numel, spec)
        except ProtocolError as err:
            return err
    return found.indices.numpy().tobytes(), found.values.numpy().tobytes()


def _codec_targets() -> Iterator[Target]:
    import torch

    from talkoot.protocol.codec import encode_tensor
    from talkoot.protocol.kernels import KERNELS

    KERNELS.compile()  # before time and memory are looked at
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5000, generator=generator)
    for spec in _SPECS:
        numel = 5000 if spec.kind == "topk" else 100
        seeds = [encode_tensor(scale * noise[:numel], spec).to_bytes() for scale in (1e-3, 1.0)]
        seeds.append(encode_tensor(torch.zeros(numel), spec).to_bytes())
        half = len(seeds[0]) // 2
        seeds += [seeds[0][:half] + _bomb(2**26), seeds[0][:24] + _bomb(2**24)]

        def run(data: bytes, numel: int = numel, spec: CodecSpec = spec) -> object:
            """By both kinds of loops, which must find the same."""
            by_numpy, compiled = (_read(data, numel, spec, compiled=c) for c in (False, True))
            if isinstance(by_numpy, ProtocolError) and isinstance(compiled, ProtocolError):
                raise compiled
            assert by_numpy == compiled, "the compiled loops find something else"
            return compiled

        yield Target(f"codec-{spec.kind}-{spec.value_bits}bit", run, seeds, weight=0.8)


def _file_targets(scratch: Path) -> Iterator[Target]:
    import torch

    from talkoot.protocol.codec import encode_tensor
    from talkoot.protocol.manifest import manifest_of
    from talkoot.protocol.payload import verify_payload, write_payload
    from talkoot.protocol.weights import WeightsReader, save_weights

    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"layer.{i}.weight": torch.randn(shape, generator=generator)
        for i, shape in enumerate(_SHAPES)
    }
    manifest = manifest_of(tensors.items())
    path = scratch / "input.safetensors"
    for spec in _SPECS[:2]:
        items = ((name, encode_tensor(tensor, spec)) for name, tensor in tensors.items())
        write_payload(path, manifest, spec, items, {"round": "3"})

        def payload(data: bytes, spec: CodecSpec = spec) -> object:
            path.write_bytes(data)
            return verify_payload(path, manifest, spec)

        yield Target(
            f"payload-file-{spec.value_bits}bit",
            payload,
            [path.read_bytes()],
            "safetensors",
            weight=0.3,
        )
    save_weights(path, manifest, tensors.__getitem__)

    def weights(data: bytes) -> object:
        path.write_bytes(data)
        reader = WeightsReader(path, manifest)
        return [reader.get(name) for name in reader.names()]

    yield Target("weights-file", weights, [path.read_bytes()], "safetensors", weight=0.3)


# Messages, statements, keys ----------------------------------------------------------------


def _message_targets() -> Iterator[Target]:
    for kind in message_kinds():

        def read(data: bytes, kind: type[Message] = kind) -> object:
            return canonical_bytes(parse(kind, data))

        yield Target(f"message-{kind.__name__}", read, [canonical_bytes(example(kind))], "json")


def _statement_targets() -> Iterator[Target]:
    from tests.data_plane import AUTHORITY, IDENTITIES, NODE

    from talkoot.client.fresh import Seen, see_head, see_task, see_version
    from talkoot.protocol.identity import (
        NodeKey,
        load_bundle,
        load_certificate,
        load_public_key,
        make_csr,
        verify,
    )
    from talkoot.protocol.messages import Head, RoundTask, VersionStatement
    from talkoot.server.ca import key_of_csr

    key = NodeKey.generate()
    looks: dict[str, tuple[type[Message], Callable[..., object]]] = {
        "Head": (Head, see_head),
        "VersionStatement": (VersionStatement, see_version),
        "RoundTask": (RoundTask, see_task),
    }
    for name, (kind, see) in looks.items():
        seed = example(kind)

        def statement(
            data: bytes, name: str = name, kind: type[Message] = kind, see: Any = see
        ) -> object:
            # Signed by the coordinator's own key: what a hostile one can say.
            try:
                signed = key.sign(name, data)
            except UnicodeDecodeError as err:
                raise ProtocolError("not ASCII") from err
            told = verify(signed, name, key.public_key, kind)
            return see(Seen(), told, "0" * 32, 0.5)

        yield Target(f"statement-{name}", statement, [canonical_bytes(seed)], "json", weight=0.15)

    signed = canonical_bytes(key.sign("Head", canonical_bytes(example(Head))))
    yield Target(
        "signed-envelope",
        lambda data: verify(parse(Signed, data), "Head", key.public_key, Head),
        [signed],
        "json",
        weight=0.3,
    )
    _, pem = IDENTITIES[NODE]
    yield Target("certificate", load_certificate, [pem, AUTHORITY.pem], weight=0.3)
    yield Target("certificate-bundle", load_bundle, [AUTHORITY.pem, AUTHORITY.pem * 2], weight=0.3)
    public = IDENTITIES[NODE][0]
    yield Target("private-key", NodeKey.from_pem, [public], weight=0.2)
    yield Target("public-key", load_public_key, [key.public_pem], weight=0.3)
    yield Target("csr", key_of_csr, [make_csr(key, key.node_id)], weight=0.3)


# Whatever else comes from outside ------------------------------------------------------------


def _other_targets() -> Iterator[Target]:
    import grpc
    import httpx

    from talkoot.client.flower import _explain
    from talkoot.protocol.blocks import CommittedBlocks
    from talkoot.protocol.corpus import CorpusManifest, load_block, parse_manifest
    from talkoot.protocol.invite import Invite
    from talkoot.protocol.manifest import Manifest
    from talkoot.protocol.messages import BlockRef, Lease, RunSpec
    from talkoot.protocol.model import config_bytes, parse_config, preset
    from talkoot.protocol.pieces import Pieces
    from talkoot.protocol.refusals import from_status, to_status
    from talkoot.protocol.sequences import Sequences
    from talkoot.protocol.wire.transfer_pb2 import PieceList

    yield Target("manifest", Manifest.from_bytes, [example(Manifest).to_bytes()], "json")
    corpus = example(CorpusManifest)
    yield Target("corpus-manifest", parse_manifest, [canonical_bytes(corpus)], "json")
    configs = [config_bytes(preset(name)) for name in ("nano", "small")]
    yield Target("model-config", parse_config, configs, "json")

    def invite(data: bytes) -> object:
        return Invite.parse(data.decode("utf-8", "surrogateescape"))

    urls = [
        f"https://{host}:7443/join#token={'t' * 32}&ca={'0' * 64}"
        for host in ("talkoot.example", "[::1]", "127.0.0.1")
    ]
    yield Target("invite", invite, [url.encode() for url in urls])

    def pieces(data: bytes) -> object:
        if len(data) > limits.MAX_TRANSFER_MESSAGE:
            raise ProtocolError("over gRPC's cap")
        try:
            told = PieceList.FromString(data)
        except Exception as err:  # gRPC's own deserializer: the call fails with INTERNAL
            raise ProtocolError("not protobuf") from err
        found = Pieces(told.total_size, told.digests)
        return [found.digest(0), found.end(0)]

    listed = PieceList(total_size=3 * limits.PIECE, digests=bytes(96)).SerializeToString()
    yield Target("piece-list", pieces, [listed])

    block = struct.pack("<4H", 1, 2, 3, 4)
    yield Target("block", lambda data: load_block(data, corpus), [block])
    spec: RunSpec = example(RunSpec)
    spec = spec.model_copy(update={"sequence_length": 2, "micro_batch": 2})
    lease = example(Lease).model_copy(
        update={"tokens": 4, "blocks": (BlockRef(epoch=0, block=0),), "lease_id": "0" * 32}
    )

    def sequences(data: bytes) -> object:
        return Sequences(spec, corpus, lease, [data]).batch(0)

    yield Target("sequences", sequences, [block], weight=0.3)
    committed = CommittedBlocks(100)
    committed.add([BlockRef(epoch=0, block=7), BlockRef(epoch=1, block=9)])
    yield Target("committed-blocks", CommittedBlocks.from_bytes, [committed.to_bytes()])

    refusal = to_status(RefusedError("No.", code="banned"))[1].encode()

    def status(data: bytes) -> object:
        raise from_status(
            grpc.StatusCode.PERMISSION_DENIED, data.decode("utf-8", "replace"), peer="the peer"
        )

    yield Target("grpc-refusal", status, [refusal], "json")
    ask = httpx.Request("POST", "https://127.0.0.1/v1/fleet/pull-messages")

    def gateway_no(data: bytes) -> object:
        code = (400, 401, 403, 500)[len(data) % 4]
        answer = httpx.Response(code, content=data, request=ask)
        raise _explain(httpx.HTTPStatusError("no", request=ask, response=answer))

    flower = json.dumps({"code": 2004, "message": "x", "public_details": None}).encode()
    yield Target("gateway-answer", gateway_no, [flower, refusal], "json", weight=0.5)


def _gateway_target() -> Iterator[Target]:
    from talkoot.server.gateway import Gateway, GatewayLimits

    class Nobody:
        """A backend that lets nobody in: what is fuzzed is in front of it."""

        def enrol(self, request: EnrolRequest, peer: str) -> EnrolReply:
            from talkoot.server.ca import key_of_csr

            key_of_csr(request.csr_pem.encode("ascii", "replace"))
            raise RefusedError("No.", code="no")

        def renew(self, signed: Signed, peer_node_id: str | None) -> RenewReply:
            raise RefusedError("No.", code="no")

        def is_banned(self, public_key: bytes) -> str | None:
            return "Banned."

        def __getattr__(self, name: str) -> Any:
            return lambda: b"{}"

    endless = GatewayLimits(*[(1e12, 1e12)] * 5)
    gateway = Gateway(Nobody(), "https://127.0.0.1:1", b"", endless)
    loop = asyncio.new_event_loop()

    def run(data: bytes) -> object:
        """The path is chosen by the first byte; the rest is the body."""
        paths = ("/api/v1/enrol", "/api/v1/renew", "/v1/fleet/pull-messages")
        path = paths[data[0] % 3 if data else 0]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": data[1:], "more_body": False}

        async def send(event: Any) -> None:
            sent.append(event)

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "raw_path": path.encode(),
            "query_string": b"",
            "client": ("127.0.0.1", 1),
            "headers": [
                (b"content-length", str(len(data)).encode()),
                (b"flwr-public-key", data[:200].replace(b"\0", b"")),
            ],
        }
        loop.run_until_complete(gateway(scope, receive, send))
        status = sent[0]["status"]
        if not 400 <= status < 500 and status != 503:
            raise RuntimeError(f"the gateway answered {status}")
        raise ProtocolError("refused, as it should be")

    seeds = [
        b"\x00" + canonical_bytes(example(EnrolRequest)),
        b"\x01" + canonical_bytes(example(Signed)),
        b"\x02" + bytes(40),
    ]
    yield Target("gateway-body", run, seeds, weight=0.2, close=loop.close)


def _mirror_target(scratch: Path) -> Iterator[Target]:
    """A mirror that answers with the input, byte for byte, to the real fetcher."""
    import hashlib

    from talkoot.client.mirrors import MirrorFetcher, MirrorLimits
    from talkoot.protocol.ingest import Ingest
    from talkoot.protocol.pieces import Pieces

    content = bytes(range(256)) * 4
    digest = hashlib.sha256(content).hexdigest()
    ref = ArtifactRef(digest=digest, size_bytes=len(content))
    pieces = Pieces(len(content), bytes.fromhex(digest))
    reply: list[bytes] = [b""]
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                try:
                    peer.recv(4096)
                    peer.sendall(reply[0])
                except OSError:
                    continue

    threading.Thread(target=serve, daemon=True).start()

    def run(data: bytes) -> None:
        reply[0] = data
        fetcher = MirrorFetcher(lambda _watch, _amount: None, None, MirrorLimits(stall_seconds=1))
        fetcher.mirrors.replace([url])
        with Ingest(scratch, "fuzz", digest, len(content), pieces=pieces) as ingest:
            try:
                fetcher.fetch(ref, ingest, lambda _offset: None, lambda: False)
                if ingest.offset() == ref.size_bytes:
                    ingest.finish().unlink()
            finally:
                ingest.discard()

    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1024\r\nConnection: close\r\n\r\n"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n"
    seeds = [
        head + content,
        chunked + content + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    ]
    yield Target("mirror-answer", run, seeds, "http", weight=0.004, close=listener.close)


def all_targets(scratch: Path) -> list[Target]:
    """Every parser; files that they read are made in ``scratch``."""
    return [
        *_codec_targets(),
        *_file_targets(scratch),
        *_message_targets(),
        *_statement_targets(),
        *_other_targets(),
        *_gateway_target(),
        *_mirror_target(Path(tempfile.mkdtemp(dir=scratch))),
    ]
