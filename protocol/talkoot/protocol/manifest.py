"""The parameter manifest: which tensors a model has, in which order, and the digest of its weights.

The order of the tensors is the order of ``named_parameters()`` and is part of the agreement. The
pydantic part imports no torch; the helpers on tensors import it when they are called.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field, model_validator

from talkoot.protocol import limits
from talkoot.protocol.errors import IntegrityError, ProtocolError
from talkoot.protocol.messages import Message, canonical_bytes, parse

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

DType = Literal["float32", "bfloat16"]
ITEM_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2}

_DTYPES: Final[Mapping[str, DType]] = {
    "torch.float32": "float32",
    "torch.bfloat16": "bfloat16",
}
_DOMAIN: Final = b"talkoot weights v1\0"
_SLAB_BYTES: Final = 16 * limits.MIB
"""How much of a tensor is copied to the host at a time while it is hashed."""
_RESERVED: Final = "__metadata__"
"""The one key of a safetensors header that is not a tensor."""


class TensorSpec(Message):
    """Name, shape and dtype of one parameter tensor."""

    name: Annotated[
        str,
        Field(
            min_length=1, max_length=limits.MAX_TENSOR_NAME_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$"
        ),
    ]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=1, le=limits.MAX_TENSOR_ELEMENTS)], ...],
        Field(max_length=limits.MAX_TENSOR_DIMS),
    ]
    dtype: DType

    @model_validator(mode="after")
    def _bounded(self) -> TensorSpec:
        if self.name == _RESERVED:
            raise ValueError(f"{_RESERVED} is not a name for a tensor")
        if self.numel > limits.MAX_TENSOR_ELEMENTS:
            raise ValueError(f"{self.name} has more than {limits.MAX_TENSOR_ELEMENTS} elements")
        return self

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.numel * ITEM_BYTES[self.dtype]


class Manifest(Message):
    """All parameter tensors of a model. The order is significant."""

    tensors: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=limits.MAX_TENSORS)]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if len({spec.name for spec in self.tensors}) != len(self.tensors):
            raise ValueError("two tensors have the same name")
        if self.parameters > limits.MAX_PARAMETERS:
            raise ValueError(f"more than {limits.MAX_PARAMETERS} parameters")
        return self

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(spec.numel for spec in self.tensors)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each tensor by its name."""
        return {spec.name: position for position, spec in enumerate(self.tensors)}

    def spec(self, name: str) -> TensorSpec:
        """The tensor called ``name``. Raises :class:`ProtocolError` when there is none."""
        position = self.index.get(name)
        if position is None:
            raise ProtocolError(
                f"The manifest has no tensor {name[:80]!r}.", code="manifest-mismatch"
            )
        return self.tensors[position]

    def as_float32(self) -> Manifest:
        """The same tensors held in fp32, as master weights and outer state are."""
        return Manifest(
            tensors=tuple(
                TensorSpec(name=spec.name, shape=spec.shape, dtype="float32")
                for spec in self.tensors
            )
        )

    def to_bytes(self) -> bytes:
        """Canonical JSON: the bytes of the manifest artifact."""
        return canonical_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest artifact. Raises :class:`ProtocolError` on anything else."""
        return parse(cls, data, cap=limits.MAX_JSON_ARTIFACT)

    def digest(self) -> str:
        """SHA-256 of :meth:`to_bytes`, hexadecimal: the digest of the manifest artifact."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def manifest_of(named: Iterable[tuple[str, Tensor]]) -> Manifest:
    """Describe tensors in the order given, usually ``model.named_parameters()``.

    Raises :class:`ProtocolError` for a dtype that is neither fp32 nor bf16, or an empty tensor.
    """
    specs = []
    for name, tensor in named:
        dtype = _DTYPES.get(str(tensor.dtype))
        if dtype is None:
            raise ProtocolError(
                f"Tensor {name} is {tensor.dtype}, but weights travel as float32 or bfloat16 only: "
                "convert the model first.",
                code="manifest-dtype",
            )
        try:
            specs.append(TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype))
        except ValueError as err:
            raise ProtocolError(
                f"Tensor {name[:80]!r} of shape {tuple(tensor.shape)} cannot be described: it is "
                "empty, too large or badly named.",
                code="manifest-tensor",
            ) from err
    try:
        return Manifest(tensors=tuple(specs))
    except ValueError as err:
        raise ProtocolError(
            "These tensors make no manifest: there are none, too many, or two have one name.",
            code="manifest-tensor",
        ) from err


def check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    """Raise :class:`ProtocolError` unless ``tensor`` has the shape and dtype of ``spec``."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != spec.shape or dtype != spec.dtype:
        raise ProtocolError(
            f"Tensor {spec.name} is {dtype} {tuple(tensor.shape)} where the manifest says "
            f"{spec.dtype} {spec.shape}.",
            code="manifest-mismatch",
        )


def raw_slabs(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of ``tensor``, row-major, in bounded pieces.

    Torch keeps elements in the host's byte order, and every platform that it is published for is
    little-endian, which is the order that safetensors prescribes.
    """
    import torch

    tensor = tensor.detach()
    if not tensor.is_contiguous() and tensor.numel() * tensor.element_size() > _SLAB_BYTES:
        for row in tensor:  # a strided tensor is copied row by row, never whole
            yield from raw_slabs(row)
        return
    flat = tensor.reshape(-1)
    step = max(1, _SLAB_BYTES // flat.element_size())
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].contiguous().cpu()
        raw: npt.NDArray[np.uint8] = piece.view(torch.uint8).numpy()
        yield raw.data


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 (32 bytes) over the row-major little-endian bytes of a tensor on any device."""
    sha = hashlib.sha256()
    for slab in raw_slabs(tensor):
        sha.update(slab)
    return sha.digest()


def digest_table(manifest: Manifest, get: Callable[[str], Tensor]) -> dict[str, str]:
    """Hexadecimal :func:`tensor_digest` of every tensor, in manifest order.

    Two tables show *where* two replicas differ. Raises :class:`ProtocolError` when a tensor is
    not what the manifest says.
    """
    table = {}
    for spec in manifest.tensors:
        tensor = get(spec.name)
        check_tensor(spec, tensor)
        table[spec.name] = tensor_digest(tensor).hex()
    return table


def digest_of_table(manifest: Manifest, table: Mapping[str, str]) -> str:
    """The weights digest that belongs to a :func:`digest_table`.

    SHA-256 over a domain tag and, in manifest order, the length-prefixed name and dtype, the shape
    and the tensor's digest. Raises :class:`IntegrityError` when a tensor has no entry.
    """
    sha = hashlib.sha256(_DOMAIN)
    sha.update(struct.pack("<Q", len(manifest.tensors)))
    for spec in manifest.tensors:
        if spec.name not in table:
            raise IntegrityError(f"The digest table has no entry for {spec.name}.")
        name, dtype = spec.name.encode(), spec.dtype.encode()
        sha.update(struct.pack("<Q", len(name)) + name)
        sha.update(struct.pack("<Q", len(dtype)) + dtype)
        sha.update(struct.pack(f"<Q{len(spec.shape)}Q", len(spec.shape), *spec.shape))
        sha.update(bytes.fromhex(table[spec.name]))
    return sha.hexdigest()


def weights_digest(manifest: Manifest, get: Callable[[str], Tensor]) -> str:
    """Hexadecimal digest of all weights: two replicas agree exactly when their digests do.

    A single flipped bit changes it. ``get`` returns a tensor by name; one is held at a time.
    """
    return digest_of_table(manifest, digest_table(manifest, get))
