"""Reading a corpus: its manifest is checked, its blocks are found by digest, its ids are ids."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol.corpus import (
    CorpusManifest,
    CorpusSource,
    TokenizerSpec,
    block_digest,
    load_block,
    load_heldout,
    parse_manifest,
)
from talkoot.protocol.errors import CorpusError, IntegrityError, ProtocolError
from talkoot.protocol.messages import ArtifactRef, canonical_bytes

ABSENT = "0" * 64


def write_corpus(directory: Path, blocks: list[bytes], *, vocab: int = 260) -> CorpusManifest:
    """A corpus directory of these uint16 blocks, written by hand."""
    index = b"".join(hashlib.sha256(block).digest() for block in blocks)
    heldout = np.arange(7, dtype="<u2").tobytes()
    block_tokens = len(blocks[0]) // 2
    manifest = CorpusManifest(
        tokenizer=TokenizerSpec(kind="bytes", vocab_size=vocab, eos_id=vocab - 1, digest=None),
        dtype="uint16",
        block_tokens=block_tokens,
        block_count=len(blocks),
        tokens=block_tokens * len(blocks),
        heldout_tokens=7,
        dropped_tokens=0,
        total_tokens=block_tokens * len(blocks) + 7,
        documents=1,
        heldout_documents=1,
        heldout_digest=hashlib.sha256(heldout).hexdigest(),
        blocks_index=ArtifactRef(digest=hashlib.sha256(index).hexdigest(), size_bytes=len(index)),
        sources=("here",),
    )
    directory.mkdir(exist_ok=True)
    (directory / "tokens.bin").write_bytes(b"".join(blocks))
    (directory / "blocks.idx").write_bytes(index)
    (directory / "heldout.bin").write_bytes(heldout)
    (directory / "manifest.json").write_bytes(canonical_bytes(manifest))
    return manifest


def random_blocks(count: int, tokens: int = 8) -> list[bytes]:
    ids = np.random.default_rng(5).integers(0, 259, size=(count, tokens))
    return [row.astype("<u2").tobytes() for row in ids]


def fetch(source: CorpusSource, digest: str) -> bytes:
    found = source.lookup(digest)
    assert found is not None
    with found.path.open("rb") as file:
        file.seek(found.offset)
        return file.read(found.length)


def test_every_block_and_the_index_and_the_manifest_are_found_by_digest(tmp_path: Path) -> None:
    blocks = random_blocks(300)
    blocks += blocks[:40] + [bytes(16)] * 50  # equal blocks share a digest
    manifest = write_corpus(tmp_path, blocks)
    source = CorpusSource(tmp_path)
    index = fetch(source, manifest.blocks_index.digest)
    for number, block in enumerate(blocks):
        assert fetch(source, block_digest(index, number)) == block
    assert fetch(source, source.digest) == canonical_bytes(manifest)


def test_blocks_whose_digests_begin_alike_are_told_apart(tmp_path: Path) -> None:
    # Digests with one common 8-byte prefix cannot be found by hashing, so the order is tested.
    from talkoot.protocol.corpus import _digest_order

    index = np.random.default_rng(1).integers(0, 256, size=(500, 32), dtype=np.uint8)
    index[50:120, :8] = 7
    index[200:333, :8] = index[10, :8]
    ranked = [bytes(index[block]) for block in _digest_order(index)]
    assert ranked == sorted(bytes(row) for row in index)


@pytest.mark.parametrize("digest", [ABSENT, "f" * 64, "", "zz", "00", "0" * 63, "é" * 64])
def test_what_is_not_there_is_not_found(tmp_path: Path, digest: str) -> None:
    write_corpus(tmp_path, random_blocks(5))
    assert CorpusSource(tmp_path).lookup(digest) is None


def test_held_out_tokens_are_not_served(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, random_blocks(5))
    assert CorpusSource(tmp_path).lookup(manifest.heldout_digest) is None


def test_held_out_tokens_are_read_and_checked(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, random_blocks(5))
    assert load_heldout(tmp_path, manifest).tolist() == list(range(7))
    (tmp_path / "heldout.bin").write_bytes(bytes(14))
    with pytest.raises(CorpusError, match="held-out"):
        load_heldout(tmp_path, manifest)
    (tmp_path / "heldout.bin").unlink()
    with pytest.raises(CorpusError, match="restore"):
        load_heldout(tmp_path, manifest)


def test_a_block_is_read_from_a_file_or_from_bytes(tmp_path: Path) -> None:
    blocks = random_blocks(2)
    manifest = write_corpus(tmp_path, blocks)
    path = tmp_path / "block"
    path.write_bytes(blocks[1])
    tokens = load_block(path, manifest)
    assert tokens.dtype == np.dtype(np.uint16)
    assert tokens.shape == (8,)
    assert tokens.tobytes() == blocks[1]
    assert np.array_equal(load_block(blocks[1], manifest), tokens)


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_a_block_of_another_size_or_with_a_foreign_id_is_refused(data: bytes) -> None:
    manifest = _manifest()
    ids = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2")
    if len(data) == manifest.block_bytes and (ids < 260).all():
        assert np.array_equal(load_block(data, manifest), ids)
    else:
        with pytest.raises(IntegrityError):
            load_block(data, manifest)


def test_an_id_at_the_end_of_the_vocabulary_is_refused_and_the_one_before_is_not() -> None:
    last = np.full(8, 259, dtype="<u2").tobytes()
    assert load_block(last, _manifest()).tolist() == [259] * 8
    with pytest.raises(IntegrityError, match="260"):
        load_block(last[:-2] + np.array([260], dtype="<u2").tobytes(), _manifest())


def test_a_file_longer_than_a_block_or_absent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(bytes(10**6))
    with pytest.raises(IntegrityError):
        load_block(tmp_path / "long", _manifest())
    with pytest.raises(CorpusError):
        load_block(tmp_path / "absent", _manifest())


@pytest.mark.parametrize("block", [-1, 3, 2**40])
def test_a_block_that_the_index_has_not_is_refused(block: int) -> None:
    with pytest.raises(ProtocolError):
        block_digest(bytes(96), block)


def test_an_index_of_broken_length_is_refused() -> None:
    with pytest.raises(ProtocolError):
        block_digest(bytes(95), 0)


def _manifest(**changes: Any) -> CorpusManifest:
    data: dict[str, Any] = {
        "tokenizer": TokenizerSpec(kind="bytes", vocab_size=260, eos_id=257, digest=None),
        "dtype": "uint16",
        "block_tokens": 8,
        "block_count": 2,
        "tokens": 16,
        "heldout_tokens": 7,
        "dropped_tokens": 1,
        "total_tokens": 24,
        "documents": 1,
        "heldout_documents": 1,
        "heldout_digest": ABSENT,
        "blocks_index": ArtifactRef(digest=ABSENT, size_bytes=64),
        "sources": ("here",),
    }
    return CorpusManifest(**{**data, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 17, "total_tokens": 25},
        {"total_tokens": 23},
        {"dropped_tokens": 8, "total_tokens": 31},
        {"blocks_index": ArtifactRef(digest=ABSENT, size_bytes=65)},
        {"block_tokens": 2**23, "dtype": "uint32", "tokens": 2**24, "total_tokens": 2**24 + 8},
        {"tokenizer": TokenizerSpec(kind="hf", vocab_size=70_000, eos_id=1, digest=None)},
        {"tokenizer": TokenizerSpec(kind="hf", vocab_size=5, eos_id=5, digest=None)},
        {"block_count": 0},
        {"heldout_tokens": 0, "total_tokens": 17},
        {"sources": ()},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    forged = canonical_bytes(_manifest().model_copy(update=changes))
    with pytest.raises(ProtocolError):
        parse_manifest(forged)


def test_a_manifest_survives_the_wire() -> None:
    assert parse_manifest(canonical_bytes(_manifest())) == _manifest()


@pytest.mark.parametrize("name", ["tokens.bin", "blocks.idx", "heldout.bin", "manifest.json"])
def test_a_corpus_with_a_missing_or_cut_file_is_refused(tmp_path: Path, name: str) -> None:
    write_corpus(tmp_path, random_blocks(5))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(CorpusError):
        CorpusSource(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CorpusError):
        CorpusSource(tmp_path)


def test_an_index_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, random_blocks(5))
    (tmp_path / "blocks.idx").write_bytes(bytes(5 * 32))
    with pytest.raises(CorpusError, match="index"):
        CorpusSource(tmp_path)
