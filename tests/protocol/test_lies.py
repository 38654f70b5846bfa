"""Contributions that lie about what they are cost no memory before they are refused."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from talkoot.protocol.codec import EncodedTensor, decode_tensor, encode_tensor
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.limits import MIB
from talkoot.protocol.manifest import manifest_of
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.payload import verify_payload, write_payload

SPEC = CodecSpec(chunk=256, keep=8, value_bits=2)
NOISE = torch.randn(20_000, generator=torch.Generator().manual_seed(3))
TENSORS = {"a": NOISE[:12_000].view(100, 120), "b": NOISE[12_000:]}
MANIFEST = manifest_of(TENSORS.items())


def refused(call: Callable[[], object]) -> None:
    """It raises a ProtocolError, and Python allocates less than 4 MiB on the way to it."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            call()
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    path = tmp_path / "payload"
    encoded = ((name, encode_tensor(tensor, SPEC)) for name, tensor in TENSORS.items())
    write_payload(path, MANIFEST, SPEC, encoded, {})
    verify_payload(path, MANIFEST, SPEC)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a shape of terabytes": lambda h: h["a"].update(shape=[2**42]),
    "another dtype": lambda h: h["a"].update(dtype="F32"),
    "offsets past the end": lambda h: h["b"].update(data_offsets=[0, 2**40]),
    "two tensors in one place": lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"]),
    "a tensor too many": lambda h: h.update(c=dict(h["a"])),
    "a tensor too few": lambda h: h.pop("a"),
    "another codec": lambda h: h["__metadata__"].update(talkoot_codec="99"),
    "negative offsets": lambda h: h["a"].update(data_offsets=[-5, 10]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_before_it_costs_memory(payload: Path, lie: str) -> None:
    rewrite(payload, LIES[lie])
    refused(lambda: verify_payload(payload, MANIFEST, SPEC))


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_is_said_to_be_huge_is_not_read(payload: Path, length: int) -> None:
    payload.write_bytes(struct.pack("<Q", length) + payload.read_bytes()[8:])
    refused(lambda: verify_payload(payload, MANIFEST, SPEC))


def test_a_zstd_bomb_in_any_place_is_not_inflated() -> None:
    blob = encode_tensor(NOISE, SPEC).to_bytes()
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(256 * MIB))
    frames = [i for i in range(len(blob) - 4) if blob[i : i + 4] == zstandard.FRAME_HEADER]
    assert frames
    for at in frames:
        for lie in (blob[:at] + bomb, blob[:at] + bomb + blob[at + len(bomb) :]):
            refused(lambda lie=lie: read(lie))  # type: ignore[misc]  # mypy cannot infer it


def read(blob: bytes, numel: int = NOISE.numel(), spec: CodecSpec = SPEC) -> object:
    return decode_tensor(EncodedTensor.from_bytes(blob, numel, spec), numel, spec)


@pytest.mark.parametrize(
    ("numel", "spec"),
    [
        (2**33, SPEC),
        (7, SPEC),
        (NOISE.numel(), SPEC.model_copy(update={"keep": 16})),
        (NOISE.numel(), SPEC.model_copy(update={"value_bits": 8})),
        (NOISE.numel(), CodecSpec(kind="dense")),
    ],
)
def test_a_tensor_of_another_shape_or_codec_is_refused(numel: int, spec: CodecSpec) -> None:
    blob = encode_tensor(NOISE, SPEC).to_bytes()
    refused(lambda: read(blob, numel, spec))


def test_indices_and_tables_that_make_no_sense_never_leave_their_tensor() -> None:
    blob = encode_tensor(NOISE, SPEC).to_bytes()
    for at in range(0, len(blob), 5):
        for bit in (1, 0x80):
            lie = blob[:at] + bytes([blob[at] ^ bit]) + blob[at + 1 :]
            try:
                found = decode_tensor(
                    EncodedTensor.from_bytes(lie, NOISE.numel(), SPEC), NOISE.numel(), SPEC
                )
            except ProtocolError:
                continue
            assert torch.isfinite(found.values).all()
            assert (found.indices[1:] > found.indices[:-1]).all()
            assert int(found.indices[0]) >= 0
            assert int(found.indices[-1]) < NOISE.numel()
