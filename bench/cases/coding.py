"""The codec's speed and memory on one core, beside what torch does with the same elements."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from bench.child import run_child
from bench.data import BITS, CHUNK, KEEP, gaussian
from bench.registry import Row, Run, benchmark, compare, figure
from talkoot.protocol.codec import (
    decode_section,
    encode_tensor,
    encode_with_feedback,
)
from talkoot.protocol.codec_bits import section_spans
from talkoot.protocol.kernels import KERNELS
from talkoot.protocol.messages import CodecSpec

UPLINK = CodecSpec(chunk=CHUNK, keep=KEEP, value_bits=BITS)
DOWNLINK = CodecSpec(chunk=CHUNK, keep=256, value_bits=4)


def in_turn(
    run: Run, ours: Callable[[], object], theirs: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Processor seconds of both, after each ran once for nothing: one thread works, so they are
    the wall's on a machine that does nothing else, and they leave out the others' turns."""
    ours()
    theirs()
    pairs = [(_processor(ours), _processor(theirs)) for _ in range(3 * run.repeats)]
    return [mine for mine, _ in pairs], [other for _, other in pairs]


def _processor(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@benchmark("encode")
def encode(run: Run) -> Iterator[Row]:
    """Selection, levels, packing and entropy coding against the selection alone by torch.topk."""
    torch.set_num_threads(1)
    numel = 2**22 if run.quick else 2**24
    noise = gaussian(numel)
    for name, spec, bar, compiled in (
        ("encode", UPLINK, 1.5, True),
        ("encode_numpy", UPLINK, None, False),
        ("encode_downlink", DOWNLINK, None, True),
        ("encode_downlink_numpy", DOWNLINK, None, False),
    ):
        with KERNELS.running(compiled=compiled):
            mine, other = in_turn(
                run,
                lambda spec=spec: encode_tensor(noise, spec, workers=1),  # type: ignore[misc]
                lambda spec=spec: torch.topk(  # type: ignore[misc]
                    noise.view(-1, CHUNK).abs(), spec.keep, dim=1, sorted=False
                ),
            )
        yield compare(
            f"{name}_seconds",
            "s",
            mine,
            other,
            ratio_at_most=bar,
            note=f"{spec.keep} of {CHUNK}, {spec.value_bits} bits, one core; baseline: torch.topk",
        )
    peaks = [run_child("bench.cases.coding:encode_once", {"numel": n}) for n in (2**20, numel * 4)]
    extra = (peaks[1].peak_anonymous - peaks[0].peak_anonymous) / (numel * 4)
    yield figure(
        "encode_extra_bytes",
        "B/parameter",
        extra,
        at_most=4 * 4,
        note="anonymous memory beside none: delta, feedback and its successor are 12 of them",
    )


def encode_once(numel: int) -> int:
    """In a child: what a node's encoder holds for one tensor."""
    delta, feedback = torch.full((numel,), 1e-3), torch.full((numel,), 1e-3)
    for start in range(0, numel, 2**20):
        delta[start : start + 2**20] = gaussian(min(2**20, numel - start), start)
    return encode_with_feedback(delta, feedback, UPLINK, 0.95, workers=1)[0].size_bytes


@benchmark("decode")
def decode(run: Run) -> Iterator[Row]:
    """Decode and accumulate against a plain fp32 add over the same buffer."""
    torch.set_num_threads(1)
    numel = 2**22 if run.quick else 2**24
    noise = gaussian(numel)
    encoded = encode_tensor(noise, UPLINK, workers=1)
    total = torch.zeros(numel)

    def ours() -> None:
        for (start, count), section in zip(
            section_spans(numel, UPLINK), encoded.sections, strict=True
        ):
            decode_section(section, count, UPLINK).add_to_(total[start : start + count])

    with KERNELS.running(compiled=False):
        slow, _ = in_turn(run, ours, lambda: None)
    with KERNELS.running(compiled=True):
        mine, other = in_turn(run, ours, lambda: total.add_(noise))
    rates = [numel / seconds / 1e9 for seconds in mine]
    yield compare(
        "decode_add_rate",
        "G parameters/s",
        rates,
        [numel / seconds / 1e9 for seconds in other],
        note="64 of 4096, one core; baseline: a plain fp32 add of as many",
    )
    yield figure(
        "decode_add_rate_alone",
        "G parameters/s",
        rates,
        at_least=1.2,
        note="the same by itself, in processor seconds",
    )
    yield figure(
        "decode_add_rate_numpy",
        "G parameters/s",
        [numel / seconds / 1e9 for seconds in slow],
        note="without the compiled loops",
    )
