"""Where a corpus comes from: documents as text, one at a time.

A source is ``stdlib`` (the Python standard library's own sources), a folder, a single file, or
``hf:NAME[:SPLIT[:COLUMN]]`` (a Hugging Face data set, with the extra ``talkoot[datasets]``).
"""

from __future__ import annotations

import codecs
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from talkoot.protocol import limits
from talkoot.protocol.errors import ConfigError, CorpusError

Encoding = Literal["utf-8", "latin-1"]

FOLDER_DOCUMENT_BYTES: Final = 1 * limits.MIB
"""A larger file of a folder is read as several documents, so that memory stays bounded."""
SINGLE_FILE_DOCUMENT_BYTES: Final = 16 * limits.KIB
"""A source that is one file is cut finer: a split by document needs many documents."""

_READ: Final = 1 * limits.MIB
_HF: Final = "hf:"
_PACKAGES: Final = frozenset({"site-packages", "dist-packages", "__pycache__"})
_LOADERS: Final = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def source_name(source: str) -> str:
    """How the manifest calls ``source``: nothing of the operator's folders but the last name."""
    if source == "stdlib":
        return source
    if source.startswith(_HF):
        name = _HF + Path(source.removeprefix(_HF)).name
    else:
        name = Path(source).resolve().name
    clean = "".join(c if c.isprintable() else "?" for c in name)[: limits.MAX_NAME_CHARS]
    return clean or "folder"


def read_documents(source: str, encoding: Encoding = "utf-8") -> Iterator[str]:
    """The documents of ``source``, none of them blank, in a fixed order.

    Files that aren't text (a NUL byte, or bytes that ``encoding`` can't say) and hidden files are
    passed over.

    Raises:
        ConfigError: the data set library is missing.
        CorpusError: nothing there, nothing readable, or nothing that is text.
    """
    if source.startswith(_HF):
        return _data_set(source)
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _folder(root, encoding, suffix=".py")
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except OSError as err:
        raise CorpusError(
            f"Cannot read the source {source} ({err.strerror or err}): name a folder, a file, "
            "stdlib or hf:NAME."
        ) from err
    if stat.S_ISDIR(mode):
        return _folder(path, encoding)
    if stat.S_ISREG(mode):
        return _single_file(path, encoding)
    raise CorpusError(f"{source} is neither a file nor a folder: name one that holds text.")


def _single_file(path: Path, encoding: Encoding) -> Iterator[str]:
    found = False
    for text in _documents_of_file(path, encoding, SINGLE_FILE_DOCUMENT_BYTES):
        found = True
        yield text
    if not found:
        raise CorpusError(
            f"{path} is empty or not {encoding} text: give a text file, or name its encoding "
            "(utf-8 or latin-1)."
        )


def _folder(root: Path, encoding: Encoding, suffix: str = "") -> Iterator[str]:
    files = documents = 0
    for path in _walk(root):
        if path.suffix != suffix and suffix:
            continue
        files += 1
        for text in _documents_of_file(path, encoding, FOLDER_DOCUMENT_BYTES):
            documents += 1
            yield text
    if not documents:
        raise CorpusError(
            f"{root} holds no text: of its {files} files each is empty or not {encoding}; "
            "give a folder of text files, or name their encoding (utf-8 or latin-1)."
        )


def _walk(root: Path) -> Iterator[Path]:
    """Regular files under ``root`` in the order of their names; hidden ones left out."""

    def refuse(err: OSError) -> None:
        raise _unreadable(Path(err.filename or root), err) from err

    for directory, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _PACKAGES)
        for name in sorted(files):
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file():  # no pipe, no dangling link
                yield path


def _documents_of_file(path: Path, encoding: Encoding, limit: int) -> Iterator[str]:
    """The text of one file, in documents of at most ``limit`` bytes; nothing if it isn't text."""
    try:
        with path.open("rb") as file:
            if not _is_text(file, encoding):
                return
            file.seek(0)
            carry = b""
            first = True
            while chunk := carry + file.read(limit - len(carry)):
                cut = len(chunk) if len(chunk) < limit else _cut(chunk, encoding)
                text = chunk[:cut].decode(encoding)
                carry = chunk[cut:]
                if first and encoding == "utf-8":
                    text = text.removeprefix("\ufeff")
                first = False
                if text.strip():
                    yield text
    except UnicodeDecodeError as err:
        raise CorpusError(
            f"{path} changed while it was read: build the corpus again when nobody writes there."
        ) from err
    except OSError as err:
        raise _unreadable(path, err) from err


def _is_text(file: BinaryIO, encoding: Encoding) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    try:
        while chunk := file.read(_READ):
            if b"\0" in chunk:
                return False
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _cut(chunk: bytes, encoding: Encoding) -> int:
    """Where a document that is too long ends: after a blank line, a line, or a character."""
    half = len(chunk) // 2
    for mark in (b"\n\n", b"\n"):
        at = chunk.rfind(mark, half)
        if at >= 0:
            return at + len(mark)
    at = len(chunk)
    if encoding == "utf-8":
        at -= 1
        while chunk[at] & 0xC0 == 0x80:  # a continuation byte (RFC 3629, section 3)
            at -= 1
    return at


def _unreadable(path: Path, err: OSError) -> CorpusError:
    return CorpusError(
        f"Cannot read {path} ({err.strerror or err}): make it readable, or leave it out."
    )


def _data_set(source: str) -> Iterator[str]:
    """Documents of a data set: by name, a local folder or file, or one saved with save_to_disk."""
    name, _, rest = source.removeprefix(_HF).partition(":")
    split, _, column = rest.partition(":")
    split, column = split or "train", column or "text"
    try:
        import datasets
    except ImportError as err:
        raise ConfigError(
            f"The source {source} needs the datasets library: install talkoot[datasets].",
            code="missing-extra",
        ) from err
    path = Path(name)
    try:
        rows: Iterable[dict[str, Any]]
        if path.is_file():
            loader = _LOADERS.get(path.suffix, "text")
            rows = datasets.load_dataset(
                loader, data_files={split: str(path)}, split=split, streaming=True
            )
        elif (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(path))[split]
        elif (path / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(name, split=split, streaming=True)
        found = False
        for row in rows:
            text = row[column]
            if not isinstance(text, str):
                raise CorpusError(
                    f"Column {column} of {source} holds {type(text).__name__} and not text: "
                    "name a text column, hf:NAME:SPLIT:COLUMN."
                )
            if text.strip():
                found = True
                yield text
    except KeyError as err:
        raise CorpusError(
            f"{source} has no split {split} or no column {column}: name both, hf:NAME:SPLIT:COLUMN."
        ) from err
    except (OSError, ValueError) as err:
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise CorpusError(f"Cannot load {source} ({reason}): check its name and split.") from err
    if not found:
        raise CorpusError(f"{source} holds no text in its column {column}: name another one.")
