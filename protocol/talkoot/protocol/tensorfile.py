"""The safetensors container, read and laid out with every size checked first.

A file is: 8 bytes little-endian header length, a JSON header that maps each name to dtype, shape
and ``data_offsets``, then the tensors' bytes without holes (safetensors format documentation). The
header is read here and not by the library because it comes from strangers: its length, names,
dtypes, shapes and spans are held against the manifest before anything else is believed.

Tensors are read with plain reads into memory of their own and not through a mapping: a file that
shrinks under a mapping kills the process (SIGBUS), a short read is an error that can be handled.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from talkoot.protocol import limits
from talkoot.protocol.direct import PastCache
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.files import explain_os_error

_LENGTH: Final = struct.Struct("<Q")
_METADATA: Final = "__metadata__"
_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor. ``dtype`` is safetensors' name: F32, BF16, U8."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """Bytes."""


def build_header(entries: Sequence[Entry], metadata: Mapping[str, str], *, room: int = 0) -> bytes:
    """The length and the header of a file that holds ``entries`` in this order, without holes.

    It has at least ``room`` bytes; what it doesn't need of them is spaces. Raises
    :class:`ProtocolError` when the header would be over its cap.
    """
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % _ALIGNMENT)
    text = text.ljust(room - _LENGTH.size)
    if len(text) > limits.MAX_SAFETENSORS_HEADER:
        raise ProtocolError(
            f"A safetensors header of {len(text)} bytes is over the cap of "
            f"{limits.MAX_SAFETENSORS_HEADER} bytes: shorten the metadata or the tensor names.",
            code="too-large",
        )
    return _LENGTH.pack(len(text)) + text


class TensorFile:
    """The checked header of a safetensors file whose tensors are known beforehand.

    Holds no file open: a coordinator looks into as many payloads at once as it has nodes.

    Args:
        path: the file.
        names: the tensors that it must hold, exactly, in the order in which :meth:`read` counts.
        size_cap: bytes that the file may have.
        code: of the :class:`ProtocolError` raised for anything that is not as it must be.
    """

    def __init__(self, path: Path, names: Mapping[str, int], *, size_cap: int, code: str) -> None:
        self.path = path
        self._names = names
        self._code = code
        self.metadata: dict[str, str] = {}
        self.dtypes: list[str] = [""] * len(names)
        self.shapes: list[tuple[int, ...]] = [()] * len(names)
        self._spans = array("Q", bytes(16 * len(names)))  # start and length by position
        try:
            with path.open("rb") as file:
                self.size_bytes = os.fstat(file.fileno()).st_size
                if self.size_bytes > min(size_cap, limits.MAX_ARTIFACT):
                    raise self._wrong(f"{self.size_bytes} bytes are over the cap of {size_cap}")
                prefix = file.read(_LENGTH.size)
                if len(prefix) < _LENGTH.size:
                    raise self._wrong("it is shorter than its first field")
                (length,) = _LENGTH.unpack(prefix)
                if length > min(limits.MAX_SAFETENSORS_HEADER, self.size_bytes - _LENGTH.size):
                    raise self._wrong(f"it claims a header of {length} bytes")
                text = file.read(length)
        except OSError as err:
            raise explain_os_error(err, "reading tensors", path) from err
        self._take(self._parse(text), _LENGTH.size + length)

    def span(self, name: str) -> tuple[int, int]:
        """Offset in the file and length of a tensor's bytes."""
        position = self._names[name]
        return self._spans[2 * position], self._spans[2 * position + 1]

    def read(self, name: str, offset: int = 0, length: int | None = None) -> npt.NDArray[np.uint8]:
        """The bytes of one tensor, or ``length`` of them from ``offset`` on, in own memory."""
        if length is None:
            length = self.span(name)[1] - offset
        data = np.empty(length, dtype=np.uint8)
        self.read_into(name, offset, data)
        return data

    def read_into(self, name: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
        """Fill ``data`` with the bytes of a tensor from ``offset`` on; any thread may."""
        start, size = self.span(name)
        if not 0 <= offset <= offset + data.size <= size:
            raise ValueError(f"{data.size} bytes from {offset} on are not in a tensor of {size}")
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with PastCache(fd, os.O_RDONLY) as file:
                    got = file.read(data, start + offset)
            finally:
                os.close(fd)
        except OSError as err:
            raise explain_os_error(err, "reading tensors", self.path) from err
        if got < data.size:
            raise self._wrong(f"it ends inside {name}")

    def wrong_entry(self, name: str, what: str) -> ProtocolError:
        """The error for an entry that is not what the manifest says."""
        return self._wrong(f"tensor {name} {what}")

    def _parse(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as err:
            raise self._wrong("its header is not JSON") from err
        if not isinstance(header, dict):
            raise self._wrong("its header is not a JSON object")
        return header

    def _take(self, header: dict[str, Any], data_start: int) -> None:
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise self._wrong("its metadata are not strings")
        self.metadata = metadata
        if header.keys() != self._names.keys():
            odd = sorted(header.keys() ^ self._names.keys())[0]
            raise self._wrong(f"its tensors are not the manifest's, beginning with {odd[:80]!r}")
        spans = []
        for name, entry in header.items():
            start, end = self._entry(name, entry)
            spans.append((start, end))
            position = self._names[name]
            self._spans[2 * position] = data_start + start
            self._spans[2 * position + 1] = end - start
        reached = 0
        for start, end in sorted(spans):
            if start != reached:
                raise self._wrong("its tensors overlap or leave holes")
            reached = end
        if data_start + reached != self.size_bytes:
            raise self._wrong(
                f"its tensors end at byte {data_start + reached} of {self.size_bytes}"
            )

    def _entry(self, name: str, entry: object) -> tuple[int, int]:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.wrong_entry(name, "has a malformed entry")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not _naturals(shape, limits.MAX_TENSOR_DIMS):
            raise self.wrong_entry(name, "has a malformed dtype or shape")
        if not _naturals(offsets, 2) or len(offsets) != 2:
            raise self.wrong_entry(name, "has malformed offsets")
        start, end = offsets
        if not 0 <= start <= end <= self.size_bytes:
            raise self.wrong_entry(name, "lies outside the file")
        position = self._names[name]
        self.dtypes[position] = dtype
        self.shapes[position] = tuple(shape)
        return start, end

    def _wrong(self, what: str) -> ProtocolError:
        return ProtocolError(
            f"{self.path.name} is not the file it should be: {what}.", code=self._code
        )


def _naturals(values: object, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and value >= 0 for value in values)
    )
