"""docs/protocol.md is enough to write the other side: here it is written from that page alone.

Nothing below takes a constant or a helper from the code that it checks.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from talkoot.protocol.codec import decode_tensor, encode_tensor
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.leases import block_order, lease_id
from talkoot.protocol.manifest import Manifest, TensorSpec, weights_digest
from talkoot.protocol.messages import BlockRef, CodecSpec, ProofChallenge, canonical_bytes
from talkoot.protocol.payload import write_payload


def entries_of(numel: int, chunk: int, keep: int) -> list[tuple[int, int]]:
    """(length, entries) of each chunk."""
    tail = numel % chunk
    chunks = [(chunk, keep)] * (numel // chunk)
    return chunks + ([(tail, min(tail, math.ceil(keep * tail / chunk)))] if tail else [])


def decode_by_the_page(blob: bytes, numel: int, chunk: int, keep: int, bits: int) -> np.ndarray:
    """The dense values of one tensor, entry by entry, in plain Python."""
    size = chunk * max(1, 2**20 // chunk)
    sections = math.ceil(numel / size)
    at = 8 * sections
    parts = []
    for number in range(sections):
        scales, gaps = struct.unpack_from("<II", blob, 8 * number)
        elements = min(size, numel - number * size)
        codes = math.ceil(sum(n for _, n in entries_of(elements, chunk, keep)) * bits / 8)
        length = 4 * 2 ** (bits - 1) + scales + gaps + codes
        body = blob[at : at + length]
        parts.append(section_by_the_page(body, scales, gaps, elements, chunk, keep, bits))
        at += length
    assert at == len(blob)
    return np.concatenate(parts)


def section_by_the_page(
    body: bytes, scales_size: int, gaps_size: int, numel: int, chunk: int, keep: int, bits: int
) -> np.ndarray:
    levels = 2 ** (bits - 1)
    table = struct.unpack_from(f"<{levels}f", body)
    at = 4 * levels
    scales = zstandard.ZstdDecompressor().decompress(body[at : at + scales_size])
    gaps = iter(zstandard.ZstdDecompressor().decompress(body[at + scales_size :][:gaps_size]))
    packed = body[at + scales_size + gaps_size :]

    root = math.sqrt(math.sqrt(math.sqrt(2.0)))
    out = np.zeros(numel, dtype=np.float32)
    entry = 0
    for number, (length, entries) in enumerate(entries_of(numel, chunk, keep)):
        octave, step = divmod(scales[number] - 255, 8)
        scale = 1.0
        for _ in range(step):
            scale *= root
        scale = math.ldexp(scale, octave) if scales[number] else 0.0
        index = -1
        for _ in range(entries):
            gap = 0
            while (byte := next(gaps)) == 255:
                gap += 255
            index += gap + byte + 1
            at, shift = divmod(entry * bits, 8)
            code = int.from_bytes(packed[at : at + 2], "little") >> shift & (2**bits - 1)
            entry += 1
            magnitude = np.float32(table[code % levels] * scale)
            if index < length and magnitude >= 2.0**-126:
                out[number * chunk + index] = -magnitude if code >= levels else magnitude
    assert next(gaps, None) is None
    assert int.from_bytes(packed, "little") >> (entry * bits) == 0
    return out


@pytest.mark.parametrize(
    ("numel", "chunk", "keep", "bits"),
    [
        (9000, 4096, 64, 2),
        (4096, 4096, 256, 4),
        (77, 4096, 64, 2),
        (1, 4096, 64, 2),
        (700, 64, 3, 8),
        (2**20 + 5000, 4096, 64, 2),  # two sections
        (2**20 + 100, 3000, 20, 3),  # a section is 349 whole chunks
    ],
)
def test_a_decoder_written_from_the_page_reads_what_the_codec_writes(
    numel: int, chunk: int, keep: int, bits: int
) -> None:
    generator = torch.Generator().manual_seed(numel)
    values = torch.randn(numel, generator=generator)
    values *= torch.exp(3 * torch.randn(numel, generator=generator))
    values[: numel // 3] = 0.0  # some chunks then send fewer values than they have entries
    spec = CodecSpec(chunk=chunk, keep=keep, value_bits=bits)
    encoded = encode_tensor(values, spec)
    ours = decode_by_the_page(encoded.to_bytes(), numel, chunk, keep, bits)
    theirs = decode_tensor(encoded, numel, spec).to_dense(numel).numpy()
    assert ours.any()
    assert ours.tobytes() == theirs.tobytes()


def test_a_payload_is_the_safetensors_file_that_the_page_describes(tmp_path: Path) -> None:
    specs = (
        TensorSpec(name="a", shape=(64, 80), dtype="float32"),
        TensorSpec(name="b", shape=(5,), dtype="bfloat16"),
    )
    manifest = Manifest(tensors=specs)
    generator = torch.Generator().manual_seed(7)
    encoded = {
        s.name: encode_tensor(torch.randn(s.shape, generator=generator), CodecSpec()) for s in specs
    }
    path = tmp_path / "payload"
    write_payload(path, manifest, CodecSpec(), encoded.items(), {})

    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"talkoot_codec": "2"}
    assert list(header) == ["a", "b"]
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert (entry["dtype"], entry["shape"]) == ("U8", [end - start])
        assert data[8 + length :][start:end] == encoded[name].to_bytes()


def test_the_weights_digest_is_the_one_that_the_page_describes() -> None:
    tensors = {
        "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,  # not contiguous
        "größe": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    }
    manifest = Manifest(
        tensors=(
            TensorSpec(name="weight", shape=(3, 2), dtype="float32"),
            TensorSpec(name="größe", shape=(2,), dtype="bfloat16"),
        )
    )
    raw = {
        "weight": struct.pack("<6f", 0, 3, 1, 4, 2, 5),
        "größe": struct.pack("<2H", 0x3FC0, 0xC000),
    }
    told = b"talkoot weights v1\0" + struct.pack("<Q", 2)
    for name, dtype, shape in (("weight", b"float32", (3, 2)), ("größe", b"bfloat16", (2,))):
        utf8 = name.encode()
        told += struct.pack("<Q", len(utf8)) + utf8 + struct.pack("<Q", len(dtype)) + dtype
        told += struct.pack("<Q", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
        told += hashlib.sha256(raw[name]).digest()
    assert weights_digest(manifest, tensors.__getitem__) == hashlib.sha256(told).hexdigest()


def test_a_lease_has_the_id_that_the_page_describes() -> None:
    blocks = (BlockRef(epoch=0, block=7), BlockRef(epoch=1, block=0))
    text = b'["run-1",3,1,"0123456789abcdef",[[0,7],[1,0]]]'
    wanted = hashlib.sha256(b"talkoot lease\0" + text).hexdigest()[:32]
    assert lease_id("run-1", 3, 1, "0123456789abcdef", blocks) == wanted


def test_an_epoch_visits_blocks_in_the_order_that_the_page_describes() -> None:
    seed, epoch, count = 5, 2, 300
    start = hashlib.sha256(b"talkoot block order\0" + struct.pack("<QQ", seed, epoch)).digest()
    mask = 2**64 - 1

    def key(block: int) -> int:
        k = (int.from_bytes(start[:8], "little") + block * 0x9E3779B97F4A7C15) & mask
        k = (k ^ k >> 30) * 0xBF58476D1CE4E5B9 & mask
        k = (k ^ k >> 27) * 0x94D049BB133111EB & mask
        return k ^ k >> 31

    assert block_order(seed, epoch, count).tolist() == sorted(range(count), key=key)


def test_a_signature_covers_the_bytes_that_the_page_names() -> None:
    key = NodeKey.generate()
    body = canonical_bytes(ProofChallenge(nonce="0" * 32, steps=2))
    assert body == b'{"nonce":"' + b"0" * 32 + b'","steps":2}'
    signed = key.sign("ProofChallenge", body)
    public = key.public_key
    # Raises if it does not cover exactly this.
    public.verify(
        bytes.fromhex(signed.signature),
        b"talkoot-v1\0ProofChallenge\0" + signed.body.encode("ascii"),
        ec.ECDSA(hashes.SHA384()),
    )
    der = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert key.node_id == hashlib.sha256(der).hexdigest()[:16]
