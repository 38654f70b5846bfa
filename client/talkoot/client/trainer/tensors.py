"""A replica's own tensors (weights as trained, optimizer state) in files. A torch module.

These files never travel. They hold what the recipe has, in its dtypes, as safetensors; they are
written tensor by tensor, and read back only into a replica that has the same tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from talkoot.protocol.files import atomic_writer, explain_os_error
from talkoot.protocol.limits import MAX_ARTIFACT
from talkoot.protocol.manifest import raw_slabs
from talkoot.protocol.tensorfile import Entry, TensorFile, build_header

_NAMES: Final = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
_FLOATS: Final = {"F32": torch.float32, "BF16": torch.bfloat16}
Named = Sequence[tuple[str, Tensor]]


def _entry(name: str, tensor: Tensor) -> Entry:
    size = tensor.numel() * tensor.element_size()
    return Entry(name, _NAMES[tensor.dtype], tuple(tensor.shape), size)


def bytes_of(tensors: Named) -> int:
    """What they take in a file."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)


def save_tensors(path: Path, tensors: Named) -> None:
    """Write ``tensors``; the file appears whole or not at all.

    Raises :class:`CapacityError` on a full disk.
    """
    # Wide elements first, as safetensors does: every tensor is then aligned to its element.
    ordered = sorted(tensors, key=lambda pair: -pair[1].element_size())
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(atomic_writer(path))
            file.write(build_header([_entry(*pair) for pair in ordered], {"format": "pt"}))
            for _, tensor in ordered:
                for slab in raw_slabs(tensor):
                    file.write(slab)
    except OSError as err:
        raise explain_os_error(err, "saving the replica", path) from err


def open_tensors(path: Path, like: Named, *, cast: bool = False) -> Callable[[str], Tensor]:
    """Check that ``path`` holds tensors like these; returns what reads one by name, on the CPU.

    With ``cast`` a tensor may be fp32 where bf16 is wanted, and the other way round: what another
    recipe has written.

    Raises :class:`ProtocolError` (code ``"state-malformed"``) when it does not, and
    :class:`StateError` when it cannot be read.
    """
    tensors = dict(like)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    positions = {name: position for position, name in enumerate(tensors)}
    # The cap is only against nonsense: the file is our own.
    file = TensorFile(path, positions, size_cap=2 * size + MAX_ARTIFACT, code="state-malformed")
    for position, (name, tensor) in enumerate(tensors.items()):
        expected = _entry(name, tensor)
        dtype, length = file.dtypes[position], file.span(name)[1]
        if cast and {dtype, expected.dtype} <= _FLOATS.keys():
            size = tensor.numel() * _FLOATS[dtype].itemsize
            expected = Entry(name, dtype, expected.shape, size)
        if Entry(name, dtype, file.shapes[position], length) != expected:
            raise file.wrong_entry(name, f"is not {expected.dtype} {expected.shape}")

    def get(name: str) -> Tensor:
        like = tensors[name]
        dtype = _DTYPES[file.dtypes[positions[name]]]
        held = torch.from_numpy(file.read(name)).view(dtype).reshape(like.shape)
        return held.to(like.dtype)

    return get


@torch.no_grad()
def load_tensors(path: Path, into: Named, *, cast: bool = False) -> None:
    """Copy the file's tensors into ``into``. As :func:`open_tensors` in all else."""
    get = open_tensors(path, into, cast=cast)
    for name, tensor in into:
        tensor.copy_(get(name))
