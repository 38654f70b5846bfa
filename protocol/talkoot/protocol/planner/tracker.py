"""Every allocation of a piece of work, on real or fake tensors. A torch module.

A dispatch mode sees each operator's results. What is new storage is an allocation, and a finalizer
on the storage is its end, so the trace holds what was really alive, whoever kept it: autograd,
hooks or the optimizer. Memory that a kernel takes and gives back inside one operator is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from talkoot.protocol.replica import tier

ROUNDING: Final = 512
"""Bytes; CUDA's allocator gives no less, and no other granularity."""


class Event(NamedTuple):
    """One allocation, or the end of one."""

    block: int
    """Its number; an allocation's end has the same."""
    size: int
    """Bytes, rounded; 0 is the end."""
    phase: str
    """What went on then."""


@dataclass
class Trace:
    """Allocations and their ends, in order, of one tier."""

    events: list[Event] = field(default_factory=list)
    categories: dict[int, str] = field(default_factory=dict)
    """Of each block."""

    def peaks(self) -> dict[str, int]:
        """Most bytes alive in each phase, in the phases' first order; what was alive when a phase
        began counts in it."""
        held, peaks = 0, dict[str, int]()
        sizes: dict[int, int] = {}
        for block, size, phase in self.events:
            before = held
            if size:
                sizes[block] = size
                held += size
            else:
                held -= sizes.pop(block)
            peaks[phase] = max(peaks.get(phase, 0), before, held)
        return peaks

    @property
    def peak(self) -> int:
        """Most bytes alive at once."""
        return max(self.peaks().values(), default=0)

    def total(self, category: str) -> int:
        """All bytes ever allocated for a category."""
        return sum(size for block, size, _ in self.events if self.categories[block] == category)

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the moment of the peak; what was first to reach it decides."""
        held, peak = 0, 0
        now: dict[str, int] = {}
        best: dict[str, int] = {}
        sizes: dict[int, int] = {}
        for block, size, _ in self.events:
            category = self.categories[block]
            change = size or -sizes.pop(block)
            if size:
                sizes[block] = size
            held += change
            now[category] = now.get(category, 0) + change
            if held > peak:
                peak, best = held, dict(now)
        return {category: held for category, held in best.items() if held}


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is not annotated
    """Writes down storages as they come and go. Use it as a context, inside a fake mode if any.

    Attributes:
        phase: what goes on now; the caller sets it.
        traces: by tier, ``"device"`` and ``"host"`` (``replica.tier`` says which one is meant).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "build"
        self.traces: dict[str, Trace] = {"device": Trace(), "host": Trace()}
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._next = 0
        self._category: str | None = None
        self._open = True

    @contextlib.contextmanager
    def category(self, name: str) -> Iterator[None]:
        """What is allocated inside belongs to ``name``; otherwise the phase names it."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    def label(self, tensor: Tensor, category: str) -> None:
        """Say what a living tensor's storage is for."""
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            _, block, where = entry
            self.traces[where].categories[block] = category

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and note what it allocated."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a wrapper of other tensors: those come here by themselves
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten._grouped_mm.default and _is_fake(args[0]):
            offsets = args[2] if len(args) > 2 else (kwargs or {})["offs"]
            result = _grouped(args[0], args[1], offsets)
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        if size == 0:
            return
        block, where = self._next, tier()
        self._next += 1
        trace = self.traces[where]
        trace.events.append(Event(block, size, self.phase))
        trace.categories[block] = self._category or self.phase

        def gone(_: object) -> None:
            self._alive.pop(key, None)
            if self._open:
                trace.events.append(Event(block, 0, self.phase))

        self._alive[key] = (weakref.ref(storage, gone), block, where)

    def close(self) -> None:
        """Write nothing more: what goes from now on is the end of the work."""
        self._open = False


def _grouped(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """The shape of a grouped product: torch's own fake kernel knows it for bf16 only."""
    shape: tuple[int, ...] = (left.shape[-2], right.shape[-1])
    if left.dim() == right.dim():  # a gradient of weights: one product a group
        shape = (len(offsets), *shape)
    return left.new_empty(shape)


def _is_fake(tensor: object) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
