"""What the benchmarks of the codec encode: noise, and pseudo-gradients of a real short training."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from talkoot.protocol.model import build_model, named_trainable, preset

CHUNK, KEEP, BITS = 4096, 64, 2


def gaussian(numel: int, seed: int = 0) -> Tensor:
    """(numel,) fp32."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 1e-3


@cache
def pseudo_gradients(steps: int) -> dict[str, Tensor]:
    """Published minus local weights of the ``small`` preset after AdamW steps on Python source."""
    config = preset("small")
    model = build_model(config, seed=1, device="cpu")
    before = {name: p.detach().clone() for name, p in named_trainable(model)}
    text = (Path(sysconfig.get_paths()["stdlib"]) / "typing.py").read_bytes()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    length, rows = 128, 4
    for step in range(steps):
        start = step * length * rows % (len(ids) - length * rows)
        batch = ids[start : start + length * rows].view(rows, length)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: before[name] - p.detach() for name, p in named_trainable(model)}
