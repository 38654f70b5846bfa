"""Bits on the wire, for noise and for real pseudo-gradients; and what is lost: nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.data import BITS, CHUNK, KEEP, gaussian, pseudo_gradients
from bench.registry import Row, Run, benchmark, figure
from talkoot.protocol.codec import decode_tensor, encode_tensor
from talkoot.protocol.messages import CodecSpec

SPEC = CodecSpec(chunk=CHUNK, keep=KEEP, value_bits=BITS)
SPARSELOCO = (12 + BITS) * KEEP / CHUNK  # 12-bit index and 2-bit value, arXiv 2508.15706
PARAMETERS = 7.0e9


@benchmark("uplink")
def uplink(run: Run) -> Iterator[Row]:
    """Bits a parameter at 64 of 4096 with 2-bit values."""
    noise = gaussian(2**22 if run.quick else 2**25)
    encoded = encode_tensor(noise, SPEC)
    bits = 8 * encoded.size_bytes / noise.numel()
    yield figure(
        "uplink_gaussian_bits",
        "bit/parameter",
        bits,
        at_most=0.150,
        baseline=SPARSELOCO,
        note="64 of 4096, 2-bit values; baseline: SparseLoCo's wire",
    )
    yield figure(
        "uplink_7b_bytes",
        "MB",
        bits * PARAMETERS / 8e6,
        at_most=131,
        note="the same at 7.0e9 parameters",
    )
    real = pseudo_gradients(10 if run.quick else 60)
    # As one flat tensor: the figure is the code's, not that of a small model's per-tensor overhead.
    flat = torch.cat([delta.reshape(-1) for delta in real.values() if delta.dim() > 1])
    encoded = encode_tensor(flat, SPEC)
    yield figure(
        "uplink_real_bits",
        "bit/parameter",
        8 * encoded.size_bytes / flat.numel(),
        at_most=0.150,
        baseline=SPARSELOCO,
        note=f"{flat.numel():,} parameters after real AdamW steps",
    )
    sent = decode_tensor(encoded, flat.numel(), SPEC)
    yield figure(
        "uplink_lost_entries",
        "entries",
        float(len(encoded_selection(flat) - set(sent.indices.tolist()))),
        note="of the exact top-k, left out where 0 is nearer than any level",
    )


def encoded_selection(flat: torch.Tensor) -> set[int]:
    """Flat positions of the exact top-k of every chunk with a value that is not 0."""
    full = flat.numel() // CHUNK * CHUNK
    rows = flat[:full].view(-1, CHUNK)
    chosen = torch.topk(rows.abs(), KEEP, dim=1).indices
    chosen = chosen + torch.arange(len(rows))[:, None] * CHUNK
    chosen = chosen[rows.gather(1, chosen % CHUNK) != 0]
    return set(chosen.tolist())
