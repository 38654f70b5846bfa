"""An update as a file: a safetensors container with one byte tensor (U8) per parameter tensor.

Uplink and downlink use the same container. Each entry is what :meth:`EncodedTensor.to_bytes` makes
of the tensor, so that a reader decodes section by section and never holds more than one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import torch

from talkoot.protocol import limits
from talkoot.protocol.codec import (
    EncodedSection,
    EncodedTensor,
    SectionPlan,
    SparseTensor,
    decode_section,
    index_bytes,
    joined,
    max_encoded_bytes,
)
from talkoot.protocol.errors import ProtocolError, VersionError
from talkoot.protocol.files import atomic_writer, explain_os_error
from talkoot.protocol.manifest import Manifest
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.tensorfile import Entry, TensorFile, build_header

CODEC_VERSION: Final = "2"
_CODEC_KEY: Final = "talkoot_codec"
_MALFORMED: Final = "payload-malformed"


@dataclass(frozen=True)
class PayloadFacts:
    """What decoding a whole payload once tells."""

    l2_norm: float
    """Of the decoded update."""
    values: int
    """Values that were sent."""
    bits_per_parameter: float
    """The whole file over all parameters of the manifest."""
    file_bytes: int


def max_payload_bytes(manifest: Manifest, spec: CodecSpec) -> int:
    """The size that no honest payload exceeds: a cap for who receives one."""
    encoded = sum(max_encoded_bytes(tensor.numel, spec) for tensor in manifest.tensors)
    return min(limits.MAX_ARTIFACT, 8 + limits.MAX_SAFETENSORS_HEADER + encoded)


def write_payload(
    path: Path,
    manifest: Manifest,
    spec: CodecSpec,
    items: Iterable[tuple[str, EncodedTensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a payload atomically.

    ``items`` is consumed once, and each is written as it comes: the order of the items is the
    order of their bytes in the file. The header, whose room is known before the sizes are, is
    written last. The same items give the same bytes.

    Raises:
        ProtocolError: the items are not the manifest's tensors, each once.
        CapacityError: the disk is full.
        StateError: the path cannot be written.
    """
    told = {**metadata, _CODEC_KEY: CODEC_VERSION}
    most = [
        Entry(tensor.name, "U8", (size,), size)
        for tensor in manifest.tensors
        for size in [max_encoded_bytes(tensor.numel, spec)]
    ]
    room = len(build_header(most, told))
    written: dict[str, int] = {}
    try:
        with atomic_writer(path) as file:
            file.write(bytes(room))
            for name, encoded in items:
                written[name] = _write_tensor(file, manifest, spec, name, encoded, written)
            missing = manifest.index.keys() - written.keys()
            if missing:
                raise ProtocolError(
                    f"The payload lacks {len(missing)} tensors, {min(missing)} among them.",
                    code="manifest-mismatch",
                )
            file.seek(0)
            entries = [Entry(name, "U8", (size,), size) for name, size in written.items()]
            file.write(build_header(entries, told, room=room))
    except OSError as err:
        raise explain_os_error(err, "writing an update", path) from err


def _write_tensor(
    file: BinaryIO,
    manifest: Manifest,
    spec: CodecSpec,
    name: str,
    encoded: EncodedTensor,
    written: Mapping[str, int],
) -> int:
    """Append one tensor; its bytes."""
    numel = manifest.spec(name).numel
    size = encoded.size_bytes
    if name in written or encoded.numel != numel or size > max_encoded_bytes(numel, spec):
        raise ProtocolError(
            f"Tensor {name} is in the payload twice, or is not encoded as the run's manifest "
            "and codec say.",
            code="manifest-mismatch",
        )
    file.write(encoded.to_bytes())
    return size


class PayloadReader:
    """A payload whose header and sizes have been checked; tensors are read when asked for.

    Raises :class:`ProtocolError` (code ``payload-malformed``) for a file that is not a payload of
    this manifest and codec, :class:`VersionError` for another codec version, :class:`StateError`
    when it cannot be read. No file stays open between calls; as a context manager it does nothing
    more than mark the extent of its use.
    """

    def __init__(self, path: Path, manifest: Manifest, spec: CodecSpec) -> None:
        self._manifest = manifest
        self._spec = spec
        self._file = TensorFile(
            path, manifest.index, size_cap=max_payload_bytes(manifest, spec), code=_MALFORMED
        )
        version = self._file.metadata.get(_CODEC_KEY)
        if version != CODEC_VERSION:
            raise VersionError(
                f"{path.name} is written in codec version {str(version)[:16]}, but this software "
                f"reads version {CODEC_VERSION}: update the older side.",
                code="codec-version",
            )
        for tensor, dtype, shape in zip(
            manifest.tensors, self._file.dtypes, self._file.shapes, strict=True
        ):
            _, length = self._file.span(tensor.name)
            if dtype != "U8" or shape != (length,):
                raise self._file.wrong_entry(tensor.name, "is not a byte tensor")
            most = max_encoded_bytes(tensor.numel, spec)
            if length > most or (spec.kind == "dense" and length != most):
                raise self._file.wrong_entry(tensor.name, f"has {length} bytes, {most} allowed")

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return self._file.size_bytes

    @property
    def metadata(self) -> dict[str, str]:
        """The strings that its writer put beside the tensors: claims, not facts."""
        return dict(self._file.metadata)

    def names(self) -> tuple[str, ...]:
        """All tensors, in manifest order."""
        return tuple(tensor.name for tensor in self._manifest.tensors)

    def encoded(self, name: str) -> EncodedTensor:
        """One tensor as it travelled."""
        numel = self._manifest.spec(name).numel
        return EncodedTensor.from_bytes(self._file.read(name).tobytes(), numel, self._spec)

    def sections(self, name: str) -> TensorSections:
        """One tensor, to be read section by section."""
        return TensorSections(self._file, name, self._manifest.spec(name).numel, self._spec)

    def decode(self, name: str, device: torch.device | str = "cpu") -> SparseTensor:
        """The values of one tensor. Raises :class:`ProtocolError` when its bytes make no sense."""
        return self.sections(name).decode_all(device)

    def decode_sections(self) -> Iterator[tuple[int, int, SparseTensor]]:
        """All values, section by section, in manifest order: number of the tensor, first element of
        the section in it, and its values at positions inside the section."""
        for position, name in enumerate(self.names()):
            sections = self.sections(name)
            for number, (start, _) in enumerate(sections.spans):
                yield position, start, sections.decode(number)

    def facts(self) -> PayloadFacts:
        """Decode everything once, section by section."""
        squares, values = [], 0
        for _, _, section in self.decode_sections():
            squares.append(section.sum_of_squares())
            values += section.values.numel()
        return PayloadFacts(
            l2_norm=math.sqrt(math.fsum(squares)),
            values=values,
            bits_per_parameter=8 * self.size_bytes / self._manifest.parameters,
            file_bytes=self.size_bytes,
        )

    def __enter__(self) -> PayloadReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


class TensorSections:
    """One tensor of a payload whose sections are read when asked for, in any order, by any thread.

    Raises :class:`ProtocolError` (code ``payload-malformed``) when their lengths make no sense.
    """

    def __init__(self, file: TensorFile, name: str, numel: int, spec: CodecSpec) -> None:
        self._file = file
        self._name = name
        self._spec = spec
        _, size = file.span(name)
        head = min(index_bytes(numel, spec), size)
        self._plan = SectionPlan(file.read(name, 0, head).tobytes(), size, numel, spec)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First element and number of elements of each section."""
        return self._plan.spans

    def __len__(self) -> int:
        return len(self._plan)

    def encoded(self, number: int) -> EncodedSection:
        """One section as it travelled."""
        start, end = self._plan.span(number)
        body = self._file.read(self._name, start, end - start).tobytes()
        return self._plan.section(number, body)

    def decode(self, number: int) -> SparseTensor:
        """The values of one section, at positions inside it."""
        return decode_section(self.encoded(number), self.spans[number][1], self._spec)

    def decode_all(self, device: torch.device | str = "cpu") -> SparseTensor:
        """The values of the whole tensor."""
        parts = [self.decode(number) for number in range(len(self))]
        return joined(parts, [start for start, _ in self.spans], device)


def verify_payload(path: Path, manifest: Manifest, spec: CodecSpec) -> PayloadFacts:
    """Check a payload whole: container, sizes, indices, finiteness of every value.

    Raises :class:`ProtocolError` for a payload that must not be aggregated. One section is
    held at a time.
    """
    return PayloadReader(path, manifest, spec).facts()
