"""Build a tokenized corpus: read, split by document, shuffle, cut in blocks.

The same documents, tokenizer and seed give the same bytes, wherever the documents lie and in
whatever order they are read: side and place of a document follow from its content and the seed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from talkoot.protocol import limits
from talkoot.protocol.corpus import (
    HELDOUT,
    HELDOUT_SOURCES,
    INDEX,
    MANIFEST,
    MAX_SOURCES,
    MAX_VOCAB,
    TOKENS,
    CorpusManifest,
    TokenizerSpec,
)
from talkoot.protocol.errors import ConfigError, CorpusError, StateError
from talkoot.protocol.files import explain_os_error, fsync_dir
from talkoot.protocol.messages import ArtifactRef, canonical_bytes
from talkoot.protocol.tokenizer import Tokenizer
from talkoot.server.sources import Encoding, read_documents, source_name

Progress = Callable[[int, int], None]
"""Called after each document with the documents and the tokens read so far."""

_SPOOL: Final = "spool"


def build_corpus(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    out_dir: Path,
    *,
    block_tokens: int,
    heldout_fraction: float,
    seed: int,
    encoding: Encoding = "utf-8",
    progress: Progress | None = None,
) -> CorpusManifest:
    """Build the corpus of ``sources`` (see ``sources.py``) in ``out_dir``, whole or not at all.

    A document is held out when a hash of the seed and its content falls under
    ``heldout_fraction``, so equal documents are on the same side. If that leaves a side empty, the
    document nearest to the line goes over. Documents are shuffled and each ends with ``eos``.

    Memory is bounded by the largest document and 32 bytes a document; while it works, the disk
    holds the tokens twice.

    Args:
        sources: at most ``MAX_SOURCES`` of them.
        tokenizer: its ids fit two bytes or are stored as four.
        out_dir: a directory that does not exist yet, or an empty one.
        block_tokens: tokens in a block.
        heldout_fraction: between 0 and 1, both excluded; of the documents.
        seed: of the split and the shuffle.
        encoding: of text files.
        progress: see :data:`Progress`.

    Raises:
        ConfigError: an argument is impossible, or the data set library is missing.
        StateError: ``out_dir`` is in use or cannot be written.
        CapacityError: the disk is full.
        CorpusError: a source is missing, unreadable, empty or not text, or all is too small.
    """
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    item_bytes = np.dtype(dtype).itemsize
    _check_arguments(sources, tokenizer, block_tokens * item_bytes, heldout_fraction, seed)
    out_dir = out_dir.absolute()
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise StateError(
                f"{out_dir} exists and is not empty: choose another directory or remove it.",
                code="exists",
            )
        work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".tmp", dir=out_dir.parent))
    except OSError as err:
        raise explain_os_error(err, "preparing the corpus", out_dir) from err
    try:
        with (work / _SPOOL).open("w+b") as spool:
            table = _Documents()
            starts = []  # first token of each source in the spool
            for source in sources:
                starts.append(table.tokens)
                for text in read_documents(source, encoding):
                    ids = _encode(tokenizer, text, dtype)
                    spool.write(ids.tobytes())
                    table.add(text, len(ids), seed)
                    if progress is not None:
                        progress(len(table), table.tokens)
            split = table.split(heldout_fraction)
            heldout = _write_heldout(work, spool, split.heldout, item_bytes)
            _write_heldout_sources(work, split.heldout, starts)
            blocks = _write_blocks(
                work, spool, split.training, item_bytes, block_tokens * item_bytes
            )
        if blocks.count == 0:
            raise CorpusError(
                f"The corpus is too small: {blocks.rest // item_bytes} training tokens fill not "
                f"one block of {block_tokens}; add text or choose a smaller block."
            )
        if blocks.count > limits.MAX_BLOCKS:
            raise CorpusError(
                f"The corpus has {blocks.count} blocks, over the cap of {limits.MAX_BLOCKS}: "
                "choose a larger block."
            )
        manifest = CorpusManifest(
            tokenizer=TokenizerSpec(
                kind=tokenizer.kind,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                digest=tokenizer.digest,
            ),
            dtype=dtype,
            block_tokens=block_tokens,
            block_count=blocks.count,
            tokens=blocks.count * block_tokens,
            heldout_tokens=heldout.size_bytes // item_bytes,
            dropped_tokens=blocks.rest // item_bytes,
            total_tokens=table.tokens,
            documents=len(split.training),
            heldout_documents=len(split.heldout),
            heldout_digest=heldout.digest,
            blocks_index=blocks.index,
            sources=tuple(source_name(source) for source in sources),
        )
        with _DigestFile(work / MANIFEST) as file:
            file.write(canonical_bytes(manifest))
        (work / _SPOOL).unlink()
        work.chmod(0o755)
        fsync_dir(work)
        work.rename(out_dir)
        fsync_dir(out_dir.parent)
    except OSError as err:
        raise explain_os_error(err, "building the corpus", out_dir) from err
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _check_arguments(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    block_bytes: int,
    heldout_fraction: float,
    seed: int,
) -> None:
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise ConfigError(f"A corpus has 1 to {MAX_SOURCES} sources, not {len(sources)}.")
    if not 0 < heldout_fraction < 1:
        raise ConfigError(
            f"The held-out fraction is {heldout_fraction}: it must lie between 0 and 1, "
            "for example 0.01."
        )
    if not 1 <= block_bytes <= limits.MAX_BLOCK:
        raise ConfigError(
            f"A block of {block_bytes} bytes is not possible: choose block_tokens so that it has "
            f"1 to {limits.MAX_BLOCK} bytes."
        )
    if not 0 <= seed < 2**63:
        raise ConfigError(f"The seed {seed} is out of range: choose 0 to 2**63 - 1.")
    if not tokenizer.vocab_size <= MAX_VOCAB:
        raise ConfigError(
            f"A vocabulary of {tokenizer.vocab_size} is over the cap of {MAX_VOCAB}: "
            "choose another tokenizer."
        )


def _encode(tokenizer: Tokenizer, text: str, dtype: str) -> npt.NDArray[np.generic]:
    """Ids of one document with its eos: (n,), little-endian."""
    ids = np.asarray([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int64)
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise CorpusError(
            f"The tokenizer gave an id outside its vocabulary of {tokenizer.vocab_size}: "
            "its files do not fit together."
        )
    return ids.astype(np.dtype(dtype).newbyteorder("<"))


# Split and shuffle ----------------------------------------------------------------------

Spans = npt.NDArray[np.uint64]
"""(documents, 2): first token in the spool, and tokens."""


@dataclass(frozen=True, slots=True)
class _Split:
    training: Spans
    heldout: Spans


class _Documents:
    """Where each document lies in the spool, and the two hashes that place it."""

    def __init__(self) -> None:
        self._rows = array("Q")  # four numbers a document: side, order, first token, tokens
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._rows) // 4

    def add(self, text: str, tokens: int, seed: int) -> None:
        content = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        placed = hashlib.sha256(b"talkoot document\0" + struct.pack("<Q", seed) + content).digest()
        side, order = struct.unpack_from("<QQ", placed)
        self._rows.extend((side, order, self.tokens, tokens))
        self.tokens += tokens

    def split(self, fraction: float) -> _Split:
        """Both sides in their shuffled order, each with at least one document."""
        rows = np.frombuffer(self._rows, dtype=np.uint64).reshape(-1, 4)
        side = rows[:, 0]
        lowest, highest = int(side.min()), int(side.max())
        if lowest == highest:
            raise CorpusError(
                "The corpus has a single document, so none can be held out: add documents, or "
                "name a long text file itself as the source, which cuts it in documents."
            )
        # The line lies above the lowest hash and not above the highest: no side stays empty.
        line = min(max(int(fraction * 2**64), lowest + 1), highest)
        heldout = side < np.uint64(line)
        ranked = np.argsort(rows[:, 1], kind="stable")
        return _Split(
            training=rows[ranked[~heldout[ranked]], 2:], heldout=rows[ranked[heldout[ranked]], 2:]
        )


# Files ----------------------------------------------------------------------


class _DigestFile:
    """A new file whose digest and size are known once it is closed, and whose bytes are on disk."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    @property
    def ref(self) -> ArtifactRef:
        return ArtifactRef(digest=self._hash.hexdigest(), size_bytes=self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


@dataclass(frozen=True, slots=True)
class _Blocks:
    count: int
    index: ArtifactRef
    rest: int  # bytes that fill no block


def _read_span(spool: BinaryIO, first: int, tokens: int, item_bytes: int) -> bytes:
    spool.seek(first * item_bytes)
    return spool.read(tokens * item_bytes)


def _write_heldout(work: Path, spool: BinaryIO, spans: Spans, item_bytes: int) -> ArtifactRef:
    with _DigestFile(work / HELDOUT) as file:
        for first, tokens in spans.tolist():
            file.write(_read_span(spool, first, tokens, item_bytes))
    return file.ref


def _write_heldout_sources(work: Path, spans: Spans, starts: Sequence[int]) -> None:
    """(documents, 2) uint64: source and tokens of each held-out document, in the file's order."""
    edges = np.asarray(starts, dtype=np.uint64)
    source = np.searchsorted(edges, spans[:, 0], side="right") - 1
    table = np.stack([source.astype("<u8"), spans[:, 1].astype("<u8")], axis=1)
    with _DigestFile(work / HELDOUT_SOURCES) as file:
        file.write(table.tobytes())


def _write_blocks(
    work: Path, spool: BinaryIO, spans: Spans, item_bytes: int, block_bytes: int
) -> _Blocks:
    """Join the documents, cut them in blocks, and write blocks and index."""
    pending = bytearray()
    count = 0
    with _DigestFile(work / TOKENS) as tokens_file, _DigestFile(work / INDEX) as index_file:
        for first, tokens in spans.tolist():
            pending += _read_span(spool, first, tokens, item_bytes)
            whole = len(pending) - len(pending) % block_bytes
            for start in range(0, whole, block_bytes):
                block = bytes(pending[start : start + block_bytes])
                tokens_file.write(block)
                index_file.write(hashlib.sha256(block).digest())
                count += 1
            del pending[:whole]
    return _Blocks(count=count, index=index_file.ref, rest=len(pending))
