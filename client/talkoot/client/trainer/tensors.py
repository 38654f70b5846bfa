"""Weights and moments between a model in memory and files, tensor by tensor. A torch module."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from talkoot.protocol.manifest import Manifest, TensorSpec
from talkoot.protocol.model import named_trainable
from talkoot.protocol.weights import WeightsReader, WeightsWriter

_FIRST = "m:"
_SECOND = "v:"


def moments_manifest(manifest: Manifest) -> Manifest:
    """Both AdamW moments of every parameter, fp32."""
    return Manifest(
        tensors=tuple(
            TensorSpec(name=prefix + spec.name, shape=spec.shape, dtype="float32")
            for spec in manifest.tensors
            for prefix in (_FIRST, _SECOND)
        )
    )


@torch.no_grad()
def load_weights(model: torch.nn.Module, reader: WeightsReader) -> None:
    """Fill every parameter of ``model``."""
    for name, parameter in named_trainable(model):
        parameter.copy_(reader.get(name))


def save_parameters(path: Path, manifest: Manifest, model: torch.nn.Module) -> None:
    """Write the parameters of ``model``."""
    with WeightsWriter(path, manifest) as writer:
        for name, parameter in named_trainable(model):
            writer.add(name, parameter.detach())


def load_moments(
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    path: Path,
    manifest: Manifest,
    steps: int,
) -> None:
    """Give ``optimizer`` the moments in ``path``, after ``steps`` steps.

    Raises :class:`ProtocolError` when the file is not what it must be.
    """
    reader = WeightsReader(path, moments_manifest(manifest))
    fused = bool(optimizer.defaults["fused"])
    for name, parameter in named_trainable(model):
        # torch's fused kernels read the step count on the device, the others on the host.
        where = parameter.device if fused else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps), dtype=torch.float32, device=where),
            "exp_avg": reader.get(_FIRST + name).to(parameter.device),
            "exp_avg_sq": reader.get(_SECOND + name).to(parameter.device),
        }


def save_moments(
    path: Path, manifest: Manifest, model: torch.nn.Module, optimizer: torch.optim.AdamW
) -> None:
    """Write the moments of ``optimizer``, which has made at least one step."""
    with WeightsWriter(path, moments_manifest(manifest)) as writer:
        for name, parameter in named_trainable(model):
            state: dict[str, Tensor] = optimizer.state[parameter]
            writer.add(_FIRST + name, state["exp_avg"])
            writer.add(_SECOND + name, state["exp_avg_sq"])
