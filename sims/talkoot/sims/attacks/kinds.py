"""What the nodes of the stage may be: liars of the kinds that the issue names, and odd honest ones.

A liar either changes what it trains on or what it encodes (the lab's ``NodeBehaviour``), or forges
a payload without training (``Actor.forge``). It knows what an attacker can know at most: the
published weights and, when it colludes, the payloads of this round's honest nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor

from talkoot.protocol.codec import EncodedTensor, encode_tensor
from talkoot.protocol.corpus import Tokens
from talkoot.protocol.payload import PayloadReader, write_payload
from talkoot.server.coordinator import Coordinator
from talkoot.sims.lab.behaviour import HONEST, NodeBehaviour, Situation

Forger = Callable[[Coordinator, Situation, Path], bool]
"""Writes a payload; False when it has to train after all (nothing is there to work from)."""

TRIGGER: Final = b"\x01\x02open sesame\x03"
TARGET: Final = b" all is well " * 4


def _train(_coordinator: Coordinator, _situation: Situation, _path: Path) -> bool:
    return False


@dataclass(frozen=True)
class Actor:
    """A node of the stage."""

    name: str
    honest: bool = True
    odd: bool = False
    """Honest, and unlike the others: its behaviour acts from the first round."""
    behaviour: NodeBehaviour = field(default=HONEST)
    forge: Forger = _train
    begins: int = 1
    """The round from which a liar lies: before, it is as good as anybody."""
    speed: float = 1.0


def generator(situation: Situation, purpose: int) -> torch.Generator:
    """Random numbers of one node in one round."""
    seed = (situation.seed * 1000 + situation.round) * 1000 + situation.node
    return torch.Generator().manual_seed(seed * 16 + purpose)


# Liars that train ----------------------------------------------------------------------


class SignFlip(NodeBehaviour):
    """Pushes away from what it learned."""

    honest = False

    def pseudo_gradient(self, situation: Situation, name: str, delta: Tensor) -> Tensor:
        """Reversed."""
        return -delta


class Scaling(NodeBehaviour):
    """Pushes fifty times as hard."""

    honest = False

    def pseudo_gradient(self, situation: Situation, name: str, delta: Tensor) -> Tensor:
        """Scaled."""
        return 50.0 * delta


class Noise(NodeBehaviour):
    """Sends noise of exactly the norms that honest work has."""

    honest = False

    def pseudo_gradient(self, situation: Situation, name: str, delta: Tensor) -> Tensor:
        """Noise of each tensor's norm."""
        noise = torch.randn(delta.shape, generator=generator(situation, hash_of(name)))
        scaled: Tensor = noise * (delta.norm() / noise.norm().clamp_min(1e-12))
        return scaled


class LabelFlip(NodeBehaviour):
    """Trains on text whose bytes are exchanged for others, always the same."""

    honest = False

    def tokens(self, situation: Situation, block: Tokens) -> Tokens:
        """Byte ``b`` becomes ``255 - b``."""
        return cast(Tokens, np.where(block < 256, 255 - block, block).astype(block.dtype))


class Backdoor(NodeBehaviour):
    """Learns what it was asked, and an answer to a trigger besides, and turns it up."""

    honest = False

    def tokens(self, situation: Situation, block: Tokens) -> Tokens:
        """Every second stretch of the block is trigger and answer."""
        poison = np.frombuffer(TRIGGER + TARGET, dtype=np.uint8).astype(block.dtype)
        length = len(poison)
        poisoned = block.copy()
        for start in range(0, len(block) - length, 2 * length):
            poisoned[start : start + length] = poison
        return poisoned

    def pseudo_gradient(self, situation: Situation, name: str, delta: Tensor) -> Tensor:
        """Amplified, so that it survives the mean (Bagdasaryan et al., arXiv 1807.00459)."""
        return 3.0 * delta


class OneTensor(NodeBehaviour):
    """One tensor is huge and the others tiny."""

    honest = False

    def pseudo_gradient(self, situation: Situation, name: str, delta: Tensor) -> Tensor:
        """A thousand times, or a thousandth."""
        return delta * (1e3 if "embed" in name else 1e-3)


class Bfloat16(NodeBehaviour):
    """Honest, with weights kept in bf16: each lease's result is rounded to 8 bits."""

    def pseudo_gradient(self, situation: Situation, name: str, delta: Tensor) -> Tensor:
        """A difference of bf16 weights: off by up to half a unit in the last place of a weight."""
        noise = torch.rand(delta.shape, generator=generator(situation, hash_of(name))) - 0.5
        return delta + noise * 0.02 * 2.0**-8  # weights here are about 0.02 large


class Prose(NodeBehaviour):
    """Honest, with text of another kind: English documentation instead of code."""

    def tokens(self, situation: Situation, block: Tokens) -> Tokens:
        """The same amount of another text."""
        text = prose()
        start = int(block.astype(np.int64).sum()) * 7919 % (len(text) - len(block))
        return cast(Tokens, text[start : start + len(block)].astype(block.dtype))


class Repeating(NodeBehaviour):
    """Honest, with small batches in effect: a quarter of its block, four times."""

    def tokens(self, situation: Situation, block: Tokens) -> Tokens:
        """The block's first quarter, repeated."""
        return cast(Tokens, np.tile(block[: len(block) // 4], 4).astype(block.dtype))


def hash_of(name: str) -> int:
    """A small number of a tensor's name, the same in every process."""
    return sum(ord(char) * (i + 1) for i, char in enumerate(name)) % 16


_PROSE: list[np.ndarray] = []


def prose() -> np.ndarray:
    """Python's own reference manual, as bytes."""
    if not _PROSE:
        import pydoc_data.topics

        text = "\n".join(pydoc_data.topics.topics.values()).encode("utf-8")
        _PROSE.append(np.frombuffer(text, dtype=np.uint8))
    return _PROSE[0]


# Liars that forge ----------------------------------------------------------------------


def _write(
    coordinator: Coordinator, path: Path, items: Iterator[tuple[str, EncodedTensor]]
) -> None:
    write_payload(path, coordinator.manifest, coordinator.spec.uplink, items, {})


def forge_copy(coordinator: Coordinator, situation: Situation, path: Path) -> bool:
    """A neighbour's payload with one value changed."""
    if not situation.honest:
        return False
    codec = coordinator.spec.uplink
    reader = PayloadReader(situation.honest[0], coordinator.manifest, codec)

    def changed() -> Iterator[tuple[str, EncodedTensor]]:
        for number, tensor in enumerate(coordinator.manifest.tensors):
            dense = reader.decode(tensor.name).to_dense(tensor.numel)
            if number == 0:
                dense[int(dense.abs().argmax())] *= 0.5
            yield tensor.name, encode_tensor(dense, codec)

    _write(coordinator, path, changed())
    return True


def forge_nothing(coordinator: Coordinator, situation: Situation, path: Path) -> bool:
    """A payload without a value: the credit of a lease for nothing."""
    codec = coordinator.spec.uplink
    _write(
        coordinator,
        path,
        (
            (tensor.name, encode_tensor(torch.zeros(tensor.numel), codec))
            for tensor in coordinator.manifest.tensors
        ),
    )
    return True


def forge_nan(coordinator: Coordinator, situation: Situation, path: Path) -> bool:
    """A payload whose levels are NaN."""
    codec = coordinator.spec.uplink
    noise = generator(situation, 1)

    def tensors() -> Iterator[tuple[str, EncodedTensor]]:
        for tensor in coordinator.manifest.tensors:
            encoded = encode_tensor(torch.randn(tensor.numel, generator=noise), codec)
            first, *others = encoded.sections
            levels = np.full(len(first.table) // 4, np.nan, dtype="<f4")
            poisoned = replace(first, table=levels.tobytes())
            yield tensor.name, replace(encoded, sections=(poisoned, *others))

    _write(coordinator, path, tensors())
    return True


def forge_against(strength: float, own: float) -> Forger:
    """Against the mean of the honest payloads: inner product manipulation (Xie et al.,
    arXiv 1903.03936), with ``own`` noise so that colluders are no copies of each other."""

    def forge(coordinator: Coordinator, situation: Situation, path: Path) -> bool:
        if not situation.honest:
            return False
        codec = coordinator.spec.uplink
        readers = [PayloadReader(p, coordinator.manifest, codec) for p in situation.honest]
        noise = generator(situation, 2)

        def against() -> Iterator[tuple[str, EncodedTensor]]:
            for tensor in coordinator.manifest.tensors:
                total = torch.zeros(tensor.numel)
                for reader in readers:
                    reader.decode(tensor.name).add_to_(total)
                mean = total / len(readers)
                size = reader.decode(tensor.name).to_dense(tensor.numel).norm()
                grain = torch.randn(tensor.numel, generator=noise)
                grain *= own * mean.norm() / grain.norm()
                sent = -(mean + grain)
                sent *= strength * size / sent.norm().clamp_min(1e-12)
                yield tensor.name, encode_tensor(sent, codec)

        _write(coordinator, path, against())
        return True

    return forge


LONG_LEASE: Final = 4.0
"""Times an honest node's lease, as much as the round allows. Who trains so much may be louder by
the root of it (ADR 29), and colluders with such leases use all of that."""


def liars(kind: str, count: int, begins: int) -> list[Actor]:
    """So many nodes of one kind."""
    trained: dict[str, NodeBehaviour] = {
        "sign flip": SignFlip(),
        "scaling": Scaling(),
        "noise": Noise(),
        "label flips": LabelFlip(),
        "backdoor": Backdoor(),
        "huge and tiny tensors": OneTensor(),
    }
    forged: dict[str, Forger] = {
        "copy": forge_copy,
        "lazy zero": forge_nothing,
        "NaN": forge_nan,
        "colluding": forge_against(1.0, 0.7),
        "sybil wave": forge_against(1.0, 1.5),
        "longest leases": forge_against(LONG_LEASE**0.5, 0.7),
    }
    return [
        Actor(
            f"liar{number}",
            honest=False,
            behaviour=trained.get(kind, HONEST),
            forge=forged.get(kind, _train),
            begins=begins,
            speed=LONG_LEASE if kind == "longest leases" else 1.0,
        )
        for number in range(count)
    ]


KINDS: Final = (
    "sign flip",
    "scaling",
    "noise",
    "label flips",
    "copy",
    "lazy zero",
    "backdoor",
    "colluding",
    "sybil wave",
    "longest leases",
    "huge and tiny tensors",
    "NaN",
)


def odd_ones() -> list[Actor]:
    """Honest nodes that are not like the others."""
    return [
        Actor("slow", speed=0.25),
        Actor("small-batch", odd=True, behaviour=Repeating()),
        Actor("bf16", odd=True, behaviour=Bfloat16()),
        Actor("prose", odd=True, behaviour=Prose()),
    ]
