"""Dense weights as safetensors files, tensor by tensor: write, read, and apply an update.

A file made here loads with ``safetensors.torch.load_file``. Peak memory is set by the largest
tensor and not by the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from talkoot.protocol import limits
from talkoot.protocol.codec import SparseTensor
from talkoot.protocol.direct import BLOCK, PastCache, congruent
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.files import atomic_writer, explain_os_error
from talkoot.protocol.kernels import KERNELS
from talkoot.protocol.manifest import (
    ITEM_BYTES,
    Manifest,
    TensorSpec,
    check_tensor,
    digest_of_table,
    digest_table,
    raw_slabs,
)
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.parallel import in_order
from talkoot.protocol.payload import PayloadReader, TensorSections
from talkoot.protocol.tensorfile import Entry, TensorFile, build_header

_WIRE_DTYPE: Final = {"float32": "F32", "bfloat16": "BF16"}
_TORCH_DTYPE: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class WeightsWriter:
    """Write dense weights one tensor at a time; the file appears whole or not at all.

    Use as a context manager and :meth:`add` every tensor of the manifest once, in any order; or in
    parts, with :meth:`put` (any order, any thread) and :meth:`digest_next` (in order). The digest
    is computed on the way. Leaving the block with a tensor missing raises :class:`ProtocolError`
    and leaves no file; a full disk raises :class:`CapacityError`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._hashes: dict[str, Any] = {}  # SHA-256 of each tensor, as tensor_digest has it
        self._left = {spec.name: spec.size_bytes for spec in manifest.tensors}
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._disk: PastCache | None = None
        # Wide elements first, as safetensors does: every tensor is then aligned to its element.
        ordered = sorted(manifest.tensors, key=lambda spec: -ITEM_BYTES[spec.dtype])
        entries = [
            Entry(spec.name, _WIRE_DTYPE[spec.dtype], spec.shape, spec.size_bytes)
            for spec in ordered
        ]
        self._header = build_header(entries, {"format": "pt"})
        self._offsets: dict[str, int] = {}
        offset = len(self._header)
        for entry in entries:
            self._offsets[entry.name] = offset
            offset += entry.size

    def add(self, name: str, tensor: Tensor, *, digest: bool = True) -> None:
        """Write one tensor, which must have the manifest's shape and dtype.

        ``digest``: take it into the digest. Hashing costs as much as writing; who never asks for
        :attr:`weights_digest` can leave it out.
        """
        if self._file is None:
            raise ValueError("WeightsWriter.add is for use inside its with block")
        spec = self._manifest.spec(name)
        check_tensor(spec, tensor)
        if self._left[name] < spec.size_bytes:
            raise ProtocolError(f"Tensor {name} was written twice.", code="manifest-mismatch")
        offset = 0
        for slab in raw_slabs(tensor):
            if digest:
                self.digest_next(name, slab)
            self.put(name, offset, slab)
            offset += len(slab)

    def place(self, name: str) -> int:
        """Where in the file a tensor's bytes begin."""
        return self._offsets[name]

    def put(self, name: str, offset: int, data: memoryview) -> None:
        """Write some bytes of a tensor, from its byte ``offset`` on. Each must be put once.

        Memory that is :func:`congruent` to the :meth:`place` goes past the page cache.
        """
        if self._disk is None:
            raise ValueError("WeightsWriter.put is for use inside its with block")
        try:
            self._disk.write(np.frombuffer(data, dtype=np.uint8), self._offsets[name] + offset)
        except OSError as err:
            raise explain_os_error(err, "writing weights", self._path) from err
        with self._lock:
            self._left[name] -= len(data)

    def digest_next(self, name: str, data: memoryview) -> None:
        """Take the next bytes of a tensor into the digest."""
        self._hashes.setdefault(name, hashlib.sha256()).update(data)

    @property
    def weights_digest(self) -> str:
        """Digest of all weights, once every tensor went into it whole."""
        table = {name: sha.hexdigest() for name, sha in self._hashes.items()}
        return digest_of_table(self._manifest, table)

    def __enter__(self) -> WeightsWriter:
        try:
            self._file = self._stack.enter_context(atomic_writer(self._path))
            self._file.write(self._header)
            self._file.flush()
            self._disk = self._stack.enter_context(PastCache(self._file.fileno(), os.O_WRONLY))
        except OSError as err:
            raise explain_os_error(err, "writing weights", self._path) from err
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file = self._disk = None
        missing = [name for name, left in self._left.items() if left]
        if value is None and missing:
            unfinished = ProtocolError(
                f"{len(missing)} tensors were not written, {min(missing)} among them.",
                code="manifest-mismatch",
            )
            with contextlib.suppress(ProtocolError):  # the stack gives back what it was given
                self._stack.__exit__(type(unfinished), unfinished, None)
            raise unfinished
        try:
            self._stack.__exit__(kind, value, traceback)
        except OSError as err:
            raise explain_os_error(err, "writing weights", self._path) from err


class WeightsReader:
    """Dense weights whose header has been held against the manifest.

    Raises :class:`ProtocolError` (code ``weights-malformed``) when the file is not the manifest's,
    :class:`StateError` when it cannot be read. No file stays open between calls.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._manifest = manifest
        dense = sum(spec.size_bytes for spec in manifest.tensors)
        self._file = TensorFile(
            path,
            manifest.index,
            size_cap=8 + limits.MAX_SAFETENSORS_HEADER + dense,
            code="weights-malformed",
        )
        for spec, dtype, shape in zip(
            manifest.tensors, self._file.dtypes, self._file.shapes, strict=True
        ):
            _, length = self._file.span(spec.name)
            if (dtype, shape, length) != (_WIRE_DTYPE[spec.dtype], spec.shape, spec.size_bytes):
                raise self._file.wrong_entry(spec.name, f"is not {spec.dtype} {spec.shape}")

    def names(self) -> tuple[str, ...]:
        """All tensors, in manifest order."""
        return tuple(spec.name for spec in self._manifest.tensors)

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own: the caller may change it."""
        spec = self._manifest.spec(name)
        raw = torch.from_numpy(self._file.read(name))
        return raw.view(_TORCH_DTYPE[spec.dtype]).reshape(spec.shape)

    def place(self, name: str) -> int:
        """Where in the file a tensor's bytes begin."""
        return self._file.span(name)[0]

    def read_into(self, name: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
        """Fill ``data`` with a tensor's bytes from ``offset`` on; any thread may.

        Memory that is :func:`congruent` to the :meth:`place` is filled past the page cache.
        """
        self._file.read_into(name, offset, data)

    def digest_table(self) -> dict[str, str]:
        """The digest of every tensor as it is on disk now."""
        return digest_table(self._manifest, self.get)

    def weights_digest(self) -> str:
        """The digest of all weights as they are on disk now."""
        return digest_of_table(self._manifest, self.digest_table())

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


def save_weights(path: Path, manifest: Manifest, get: Callable[[str], Tensor]) -> str:
    """Write all tensors that ``get`` returns by name; the digest of the weights."""
    with WeightsWriter(path, manifest) as writer:
        for spec in manifest.tensors:
            writer.add(spec.name, get(spec.name))
    return writer.weights_digest


def add_sparse_(flat: Tensor, update: SparseTensor) -> tuple[Tensor, Tensor]:
    """``flat += update`` in place: in fp32, rounded to the dtype of ``flat``.

    The one way in which coordinator and nodes apply what was published: one fp32 addition per
    element that was sent, hence the same bits everywhere. Returns the elements that were sent to,
    before and after.
    """
    before = flat.index_select(0, update.indices)
    after = (before.float() + update.values).to(flat.dtype)
    flat.index_copy_(0, update.indices, after)
    return before, after


def add_sparse_compiled_(
    compiled: ModuleType,
    raw: npt.NDArray[np.uint8],
    dtype: str,
    update: SparseTensor,
    moved: npt.NDArray[np.float32],
) -> bool:
    """:func:`add_sparse_`, compiled, on the bytes of weights of that dtype.

    ``moved``: (n,) by how much each of those that were sent to changed, a result; (0,) if nobody
    asks. Whether all of them are finite.
    """
    add, view = {"float32": ("add_f32", np.float32), "bfloat16": ("add_bf16", np.uint16)}[dtype]
    indices, values = update.indices.numpy(), update.values.numpy()
    return bool(getattr(compiled, add)(raw.view(view), indices, values, moved))


def add_sparse(tensor: Tensor, update: SparseTensor) -> Tensor:
    """``tensor + update`` as :func:`add_sparse_` has it. Does not change ``tensor``."""
    flat = tensor.detach().reshape(-1).clone()
    add_sparse_(flat, update)
    return flat.reshape(tensor.shape)


def apply_update(
    manifest: Manifest,
    published_old: Path,
    update: Path,
    spec: CodecSpec,
    out: Path,
    *,
    workers: int = 1,
) -> str:
    """Write ``published_old + update`` to ``out`` and return its weights digest.

    ``out`` appears whole or not at all, and the old file is not changed. It takes the memory of a
    few sections, by ``workers`` threads. Compare the digest with the ledger's before using it.
    Raises :class:`ProtocolError` for a malformed update or old file, :class:`CapacityError` when
    the disk is full.
    """
    old = WeightsReader(published_old, manifest)
    payload = PayloadReader(update, manifest, spec)

    def jobs() -> Iterator[tuple[TensorSpec, TensorSections, int]]:
        for tensor in manifest.tensors:
            sections = payload.sections(tensor.name)
            yield from ((tensor, sections, number) for number in range(len(sections)))

    with WeightsWriter(out, manifest) as writer:

        def apply(job: tuple[TensorSpec, TensorSections, int]) -> tuple[str, memoryview]:
            tensor, sections, number = job
            start, elements = sections.spans[number]
            item = ITEM_BYTES[tensor.dtype]
            size, at = elements * item, writer.place(tensor.name) + start * item
            raw = congruent(np.empty(size + BLOCK, dtype=np.uint8), size, at)
            old.read_into(tensor.name, start * item, raw)
            update = sections.decode(number)
            if compiled := KERNELS.after(0):
                add_sparse_compiled_(compiled, raw, tensor.dtype, update, np.empty(0, np.float32))
            else:
                flat = torch.from_numpy(raw).view(_TORCH_DTYPE[tensor.dtype])
                add_sparse_(flat, update)
            writer.put(tensor.name, start * item, raw.data)
            return tensor.name, raw.data

        for name, data in in_order(apply, jobs(), workers):
            writer.digest_next(name, data)
    return writer.weights_digest
