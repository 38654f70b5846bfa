"""A real training step and the encoding of one contribution, on tensors that hold nothing.

A torch module. The model, the recipe, the loss, autograd, the optimizer and the codec are the very
code that a node runs (``replica.py``, ``codec.py``); only the tensors are fake, so a 7B replica is
planned in seconds in a few hundred MB. They are fake *CPU* tensors: fused attention then takes its
flash path, and what the CPU never copies because it is the same device is copied here explicitly.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import masking_utils

from talkoot.protocol import codec, memory, rules
from talkoot.protocol.codec_bits import section_spans
from talkoot.protocol.memory import MemoryPlan
from talkoot.protocol.messages import CodecSpec, InnerSpec
from talkoot.protocol.model import build_model
from talkoot.protocol.planner.allocator import replay, smallest_cap
from talkoot.protocol.planner.tracker import Tracker
from talkoot.protocol.recipes import Recipe
from talkoot.protocol.replica import DTYPES, Replica, build_replica, on_host, tier

STEPS: Final = 1
"""A replica's states are made with it, so the first step is like all others (the tests hold one
step to two, to the byte)."""
_CODEC: Final = CodecSpec()


def simulate(
    config: dict[str, Any],
    recipe: Recipe,
    *,
    sequence_length: int,
    micro_batch: int,
    uplink: CodecSpec = _CODEC,
    steps: int = STEPS,
    accumulated: bool = False,
) -> MemoryPlan:
    """What a replica of ``config`` under ``recipe`` needs.

    Args:
        accumulated: steps are of several batches, if the recipe can: gradients are then alive in
            the next forward pass. Two batches show all that more would.

    Raises:
        ProtocolError: the config is refused, or transformers cannot build it.
    """
    with fakes(), Tracker() as tracker:
        replica = build(tracker, config, recipe)
        parameters = [tensor.numel() for _, tensor in replica.weights()]
        ids = torch.zeros((micro_batch, sequence_length), dtype=torch.int64)
        batches = [ids, ids] if accumulated and recipe.accumulates else ids
        train(tracker, replica, [batches] * steps)
        del batches
        del ids
        heap = encode(tracker, replica, uplink)
        tracker.close()
    return plan_of(tracker, recipe, parameters, heap)


def plan_of(tracker: Tracker, recipe: Recipe, parameters: list[int], heap: int) -> MemoryPlan:
    """The plan that a trace amounts to; ``heap``: bytes that NumPy took beside it."""
    device, host = tracker.traces["device"], tracker.traces["host"]
    return memory.assemble(
        recipe,
        parameters=parameters,
        states=sum(trace.total("states") for trace in (device, host)),
        device_bytes=replay(device.events, expandable=True).peak_reserved,
        allocated_bytes=device.peak,
        smallest_cap_bytes=smallest_cap(device.events),
        host_tensors=host.peak,
        host_heap=heap,
        parts=_of_tiers(device.at_peak(), host.at_peak()),
        phases=_of_tiers(device.peaks(), host.peaks()),
        source="simulation",
    )


def _of_tiers(device: dict[str, int], host: dict[str, int]) -> dict[str, int]:
    parts = {f"device_{name}": size for name, size in device.items()}
    return parts | {f"host_{name}": size for name, size in host.items()}


@contextlib.contextmanager
def fakes() -> Iterator[None]:
    """Operators make fake tensors, and the codec's NumPy gets real numbers of the right shapes."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(torch.Tensor, "numpy", _numpy_of(torch.Tensor.numpy)),
        # Fake tensors count as a traced graph there, for which a whole attention mask is built.
        mock.patch.object(masking_utils, "is_tracing", return_value=False),
        mock.patch.object(codec, "section_spans", _ends_of(section_spans)),
        mock.patch.object(rules, "slabs", _ends_of(rules.slabs)),
        mock.patch.object(rules, "parts", _ends_of(rules.parts)),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def _ends_of(real: Callable[..., Iterable[Any]]) -> Callable[..., list[Any]]:
    """The first two and the last of the pieces that an update or the encoder goes through.

    Whatever a piece takes is gone before the next but one, so the others would show nothing new,
    and take most of the time (``tests/protocol/planner/test_simulate.py`` holds this to the whole).
    """

    def ends(*arguments: Any) -> list[Any]:
        pieces = list(real(*arguments))
        return pieces if len(pieces) < 4 else [*pieces[:2], pieces[-1]]

    return ends


def _numpy_of(real: Any) -> Any:
    def numpy(tensor: Tensor, **options: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return real(tensor, **options)
        import numpy as np

        if tensor.dtype != torch.float32:
            return real(tensor, **options)  # torch says that it cannot
        return np.random.default_rng(0).standard_normal(tuple(tensor.shape), np.float32)

    return numpy


def build(
    tracker: Tracker, config: dict[str, Any], recipe: Recipe, seed: int | None = None
) -> Replica:
    """The replica, with its parts labelled as they come."""
    with tracker.category("weights"):
        model = build_model(config, seed=seed, device="cpu", dtype=DTYPES[recipe.weights])
    for parameter in model.parameters():
        # Before the recipe's own hooks, which may use the gradient up.
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda parameter: tracker.label(parameter.grad, "gradients")
        )
    with tracker.category("states"):
        replica = build_replica(model, recipe, InnerSpec())
    for _, tensor in replica.weights():
        tracker.label(tensor, "weights")

    def on_phase(phase: str) -> None:
        tracker.phase = phase

    replica.on_phase = on_phase
    return replica


def train(tracker: Tracker, replica: Replica, batches: Sequence[Tensor | Sequence[Tensor]]) -> None:
    """Real steps at a rate that changes little."""
    for ids in batches:
        replica.step(ids, 1e-5)
    tracker.phase = "between"


def encode(tracker: Tracker, replica: Replica, spec: CodecSpec) -> int:
    """Encode the largest tensor as ``client.trainer.lease`` does; returns NumPy's peak in bytes.

    Published weights and feedback are read from their files tensor by tensor, so the largest one
    sets the peak. They pass through host memory on their way to the device. One worker encodes.
    """
    tracker.phase = "encode"
    largest = max((tensor for _, tensor in replica.weights()), key=torch.Tensor.numel)
    where = on_host if replica.recipe.states_on == "host" else contextlib.nullcontext
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start(1)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with where():
        with on_host():
            read = torch.empty(largest.shape, dtype=torch.float32)
        loaded = replica.as_loaded(_to_device(read))
        del read
        delta = loaded.float() - largest.float()
        with on_host():
            read = torch.empty(largest.shape, dtype=torch.float32)
        held = _to_device(read)
        del read
        kept: Any = codec.encode_with_feedback(delta, held, spec, 0.95)
        if tier() == "device":
            with on_host():
                kept = kept[1].clone()  # on its way to the file
    peak = tracemalloc.get_traced_memory()[1] - before
    if started:
        tracemalloc.stop()
    del kept
    return max(peak, 0)


def _to_device(host: Tensor) -> Tensor:
    """A copy in the tier of now; on the host tier nothing moves."""
    return host.clone() if tier() == "device" else host
