"""What the coordinator remembers of a payload: its norms, and a small sketch of its direction.

A torch-free module but for the payload reader. The sketch is a count-sketch (Charikar, Chen and
Farach-Colton 2002, section 3.1): every value goes, with a random sign, into one of :data:`SIZE`
buckets. Inner products survive: the cosine of two sketches is that of the payloads with a standard
error of about ``1 / sqrt(SIZE)``. Buckets and signs come from a secret of the coordinator: who does
not know them can't make two payloads that are alike look different, or the other way round.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from talkoot.protocol.manifest import Manifest
    from talkoot.protocol.messages import CodecSpec

SIZE: Final = 8192
"""Buckets; a power of two. As fp16 a sketch takes 16 KiB of the ledger."""
NOISE: Final = 1.0 / math.sqrt(SIZE)
"""Standard error of a cosine between two sketches."""

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Examination:
    """What one pass over a payload tells."""

    l2_norm: float
    largest: float
    """Largest magnitude of a value."""
    values: int
    """Values that were sent."""
    shares: F32
    """(tensors,): each tensor's share of the squared norm; they sum to 1, or are all 0."""
    sketch: F32
    """(SIZE,): the direction, of length 1; zeros for a payload without values."""


def sketch_key(secret: bytes, run_id: str) -> bytes:
    """The key of a run's sketches, from a secret that only the coordinator has.

    One key a run and not one a round: what somebody sent five rounds ago must be known again.
    """
    return hmac.new(secret, b"talkoot sketch\0" + run_id.encode(), hashlib.sha256).digest()


def _mix(x: U64) -> U64:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014, figure 17)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Sketcher:
    """Adds up one payload.

    Args:
        key: at least 32 bytes, secret.
    """

    def __init__(self, key: bytes) -> None:
        words = np.frombuffer(hashlib.sha512(key).digest(), dtype="<u8")
        self._words = [np.uint64(word) for word in words[:3]]
        self._buckets: F64 = np.zeros(SIZE, dtype=np.float64)

    def add(self, indices: npt.NDArray[np.int64], values: F32) -> None:
        """Add values at these positions of the whole model, counted in manifest order."""
        with np.errstate(over="ignore"):
            hashed = indices.astype(np.uint64) + self._words[0]
            for word in self._words[1:]:
                hashed = _mix(hashed ^ word)
        bucket = (hashed & np.uint64(SIZE - 1)).astype(np.int64)
        sign = 1.0 - 2.0 * (hashed >> np.uint64(63)).astype(np.float64)
        self._buckets += np.bincount(bucket, weights=sign * values, minlength=SIZE)

    def direction(self) -> F32:
        """(SIZE,) fp32 of length 1, or zeros."""
        length = float(np.linalg.norm(self._buckets))
        return (self._buckets / (length or 1.0)).astype(np.float32)


def examine(path: Path, manifest: Manifest, spec: CodecSpec, key: bytes) -> Examination:
    """Decode a payload once, section by section, and check every index and value on the way.

    Raises:
        ProtocolError: it must not be aggregated; see ``payload.verify_payload``.
    """
    from talkoot.protocol.payload import PayloadReader

    reader = PayloadReader(path, manifest, spec)
    sketcher = Sketcher(key)
    squares = np.zeros(len(manifest.tensors), dtype=np.float64)
    origins = np.cumsum([0] + [tensor.numel for tensor in manifest.tensors])
    largest, count = 0.0, 0
    sums: list[float] = []
    for number, start, sparse in reader.decode_sections():
        values = sparse.values.numpy()
        sums.append(sparse.sum_of_squares())
        squares[number] += sums[-1]
        if values.size:
            largest = max(largest, float(np.abs(values).max()))
            sketcher.add(sparse.indices.numpy() + (origins[number] + start), values)
        count += values.size
    total = math.fsum(sums)  # as verify_payload has it
    return Examination(
        l2_norm=math.sqrt(total),
        largest=largest,
        values=count,
        shares=(squares / (total or 1.0)).astype(np.float32),
        sketch=sketcher.direction(),
    )


def pack(values: F32) -> bytes:
    """For the ledger: fp16, little-endian."""
    return values.astype("<f2").tobytes()


def unpack(data: bytes) -> F32:
    """Inverse of :func:`pack`."""
    return np.frombuffer(data, dtype="<f2").astype(np.float32)
