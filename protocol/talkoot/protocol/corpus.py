"""A tokenized corpus: its manifest, its blocks by digest, and how a node reads one.

A corpus is a directory::

    manifest.json   canonical bytes of CorpusManifest; its digest is the corpus's
    blocks.idx      32-byte SHA-256s, one a block, in block order: an artifact of its own
    tokens.bin      all training blocks, back to back; each one can be fetched by its digest
    heldout.bin     tokens that nobody trains on; the coordinator keeps them
    heldout.src     whose documents those are: (source, tokens) of each, as 8-byte integers

Token ids are little-endian unsigned integers of 2 or 4 bytes.
"""

from __future__ import annotations

import bisect
import hashlib
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from talkoot.protocol import limits
from talkoot.protocol.artifacts import Slice
from talkoot.protocol.errors import CorpusError, IntegrityError, ProtocolError
from talkoot.protocol.messages import ArtifactRef, Count, Digest, Message, Name, parse

MANIFEST: Final = "manifest.json"
INDEX: Final = "blocks.idx"
TOKENS: Final = "tokens.bin"
HELDOUT: Final = "heldout.bin"
HELDOUT_SOURCES: Final = "heldout.src"

DIGEST_BYTES: Final = 32
MAX_VOCAB: Final = 2**24
MAX_SOURCES: Final = 64

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class TokenizerSpec(Message):
    """Which tokenizer made the ids (``tokenizer.py``)."""

    kind: Literal["bytes", "hf"]
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB)]
    eos_id: Annotated[int, Field(ge=0, lt=MAX_VOCAB)]
    digest: Digest | None
    """SHA-256 of ``tokenizer.json``; ``None`` for bytes."""


class CorpusManifest(Message):
    """All that a node and an auditor must know of a corpus. ``tokens`` are in whole blocks."""

    tokenizer: TokenizerSpec
    dtype: Literal["uint16", "uint32"]
    block_tokens: Annotated[int, Field(ge=1, le=limits.MAX_BLOCK // 2)]
    block_count: Annotated[int, Field(ge=1, le=limits.MAX_BLOCKS)]
    tokens: Count
    """In the blocks: ``block_count * block_tokens``."""
    heldout_tokens: Annotated[int, Field(ge=1, lt=2**48)]
    dropped_tokens: Count
    """Training tokens at the end that fill no block."""
    total_tokens: Count
    """``tokens + heldout_tokens + dropped_tokens``."""
    documents: Annotated[int, Field(ge=1, lt=2**48)]
    """Training documents."""
    heldout_documents: Annotated[int, Field(ge=1, lt=2**48)]
    heldout_digest: Digest
    blocks_index: ArtifactRef
    sources: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MAX_SOURCES)]

    @property
    def item_bytes(self) -> int:
        """Bytes of one token id."""
        return 2 if self.dtype == "uint16" else 4

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.block_tokens * self.item_bytes

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.block_bytes > limits.MAX_BLOCK:
            raise ValueError(f"a block is over the cap of {limits.MAX_BLOCK} bytes")
        if self.tokens != self.block_count * self.block_tokens:
            raise ValueError("tokens is not block_count * block_tokens")
        if self.dropped_tokens >= self.block_tokens:
            raise ValueError("dropped_tokens would fill a block")
        if self.total_tokens != self.tokens + self.heldout_tokens + self.dropped_tokens:
            raise ValueError("total_tokens is not the sum of its parts")
        if self.blocks_index.size_bytes != self.block_count * DIGEST_BYTES:
            raise ValueError("blocks_index has not one digest a block")
        if self.tokenizer.eos_id >= self.tokenizer.vocab_size:
            raise ValueError("eos_id is outside the vocabulary")
        if self.dtype == "uint16" and self.tokenizer.vocab_size > 2**16:
            raise ValueError("the vocabulary does not fit uint16")
        return self


def parse_manifest(data: bytes) -> CorpusManifest:
    """Read a corpus manifest. Raises :class:`ProtocolError` on anything else."""
    return parse(CorpusManifest, data, cap=limits.MAX_JSON_ARTIFACT)


def read_manifest(directory: Path) -> CorpusManifest:
    """The manifest of the corpus in ``directory``.

    Raises:
        CorpusError: no corpus there, or its files have not the sizes that the manifest states.
    """
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(limits.MAX_JSON_ARTIFACT + 1)
        manifest = parse_manifest(data)
        sizes = {name: (directory / name).stat().st_size for name in (INDEX, TOKENS, HELDOUT)}
    except OSError as err:
        raise CorpusError(
            f"{directory} is not a corpus that can be read ({err.strerror or err}: "
            f"{err.filename}): name the directory of one, or build it anew."
        ) from err
    except ProtocolError as err:
        raise CorpusError(
            f"{path} is not the manifest of a corpus ({err.sentence}): build the corpus again."
        ) from err
    due = {
        INDEX: manifest.blocks_index.size_bytes,
        TOKENS: manifest.block_count * manifest.block_bytes,
        HELDOUT: manifest.heldout_tokens * manifest.item_bytes,
    }
    for name, size in due.items():
        if sizes[name] != size:
            raise CorpusError(
                f"{directory / name} has {sizes[name]} bytes where its manifest states {size}: "
                "build the corpus again."
            )
    return manifest


def read_block(directory: Path, manifest: CorpusManifest, number: int) -> Tokens:
    """(block_tokens,) ids of a block of a corpus on disk, in memory of their own."""
    raw = np.memmap(directory / TOKENS, dtype=f"<u{manifest.item_bytes}", mode="r")
    ids: Tokens = np.array(raw[number * manifest.block_tokens :][: manifest.block_tokens])
    return ids


# The coordinator's side ----------------------------------------------------------------------


class CorpusSource:
    """A corpus directory as a ``Source`` of artifacts: its blocks, its index and its manifest.

    Files stay on disk; in memory it holds 4 bytes a block. Held-out tokens are not served: who
    trained on them would pass every check made with them.
    """

    def __init__(self, directory: Path) -> None:
        """Open the corpus in ``directory``.

        Raises:
            CorpusError: see :func:`read_manifest`; or the index does not match the manifest.
        """
        self.directory: Final = directory
        self.manifest: Final = read_manifest(directory)
        index_path, manifest_path = directory / INDEX, directory / MANIFEST
        self._index = np.memmap(index_path, dtype=np.uint8, mode="r").reshape(-1, DIGEST_BYTES)
        with index_path.open("rb") as file:
            index_digest = hashlib.file_digest(file, "sha256").hexdigest()
        if index_digest != self.manifest.blocks_index.digest:
            raise CorpusError(
                f"{index_path} is not the index that its manifest names: build the corpus again."
            )
        content = manifest_path.read_bytes()
        self.digest: Final = hashlib.sha256(content).hexdigest()
        self._whole = {
            self.digest: Slice(manifest_path, 0, len(content)),
            index_digest: Slice(index_path, 0, self.manifest.blocks_index.size_bytes),
        }
        self._order = _digest_order(self._index)

    def lookup(self, digest: str) -> Slice | None:
        """Where the bytes of ``digest`` (hexadecimal SHA-256) are, or ``None``."""
        if digest in self._whole:
            return self._whole[digest]
        try:
            target = bytes.fromhex(digest)
        except ValueError:
            return None
        if len(target) != DIGEST_BYTES:
            return None
        at = bisect.bisect_left(range(len(self._order)), target, key=self._sorted_digest)
        if at == len(self._order) or self._sorted_digest(at) != target:
            return None
        size = self.manifest.block_bytes
        return Slice(self.directory / TOKENS, int(self._order[at]) * size, size)

    def _sorted_digest(self, rank: int) -> bytes:
        return bytes(self._index[self._order[rank]])


def _digest_order(index: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Block ids in ascending order of their digests: (n, 32) -> (n,).

    Sorts by the first 8 bytes; the few runs that share those (equal blocks, mostly) are then
    sorted by the whole digest.
    """
    keys = np.ascontiguousarray(index[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
    order = np.argsort(keys, kind="stable").astype(np.uint32)
    ranked = keys[order]
    tied = np.flatnonzero(ranked[1:] == ranked[:-1])
    if len(tied):
        gaps = np.flatnonzero(np.diff(tied) > 1)
        starts = np.concatenate((tied[:1], tied[gaps + 1]))
        ends = np.concatenate((tied[gaps], tied[-1:])) + 2
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            run = sorted(order[start:end].tolist(), key=lambda block: index[block].tobytes())
            order[start:end] = run
    return order


def load_heldout(directory: Path, manifest: CorpusManifest) -> Tokens:
    """The held-out tokens, memory-mapped read-only: (heldout_tokens,).

    Raises:
        CorpusError: the file cannot be read, or is not the one that the manifest names.
    """
    path = directory / HELDOUT
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == manifest.heldout_digest:
            return _as_tokens(np.memmap(path, dtype=np.uint8, mode="r"), manifest)
    except OSError as err:
        raise CorpusError(
            f"Cannot read {path} ({err.strerror or err}): restore it or build the corpus again."
        ) from err
    raise CorpusError(
        f"{path} is not the held-out part that its manifest names: build the corpus again."
    )


# The node's side ----------------------------------------------------------------------


def block_digest(index: bytes | memoryview, block: int) -> str:
    """Digest of ``block`` from the bytes of ``blocks.idx``.

    Raises:
        ProtocolError: the index is not made of whole digests, or has no such block.
    """
    at = block * DIGEST_BYTES
    if len(index) % DIGEST_BYTES or block < 0 or at >= len(index):
        raise ProtocolError(
            f"The block index of {len(index)} bytes has no block {block}: "
            "the lease belongs to another corpus.",
            code="unknown-block",
        )
    return bytes(index[at : at + DIGEST_BYTES]).hex()


def load_block(source: Path | bytes, manifest: CorpusManifest) -> Tokens:
    """One block's token ids, read-only: (block_tokens,) uint16 or uint32.

    Raises:
        IntegrityError: not the size of a block, or an id outside the vocabulary.
        CorpusError: the file cannot be read.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                data = file.read(manifest.block_bytes + 1)  # one more shows a file that is longer
        except OSError as err:
            raise CorpusError(
                f"Cannot read the block {source} ({err.strerror or err}): fetch it anew."
            ) from err
    else:
        data = source
    if len(data) != manifest.block_bytes:
        raise IntegrityError(
            f"A block has not the {manifest.block_bytes} bytes that the corpus states: "
            "fetch it anew.",
            code="block-size",
        )
    tokens = _as_tokens(data, manifest)
    largest = int(tokens.max())
    if largest >= manifest.tokenizer.vocab_size:
        raise IntegrityError(
            f"A block holds the token {largest}, outside the vocabulary of "
            f"{manifest.tokenizer.vocab_size}: the corpus was made with another tokenizer.",
            code="block-tokens",
        )
    return tokens


def _as_tokens(
    data: bytes | np.memmap[tuple[int], np.dtype[np.uint8]], m: CorpusManifest
) -> Tokens:
    return np.frombuffer(data, dtype="<u2") if m.dtype == "uint16" else np.frombuffer(data, "<u4")
