"""How a node that does not behave comes to its payload: the real code with one function changed.

An attacker owns its machine and runs whatever it likes; what it most likely runs is the published
client with a few lines of its own. So is it here, and nothing in the client has to provide for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

from talkoot.protocol.codec import EncodedTensor
from talkoot.protocol.manifest import Manifest
from talkoot.protocol.messages import CodecSpec
from talkoot.sims.lab.behaviour import NodeBehaviour, Situation


@contextmanager
def tampered(manifest: Manifest, behaviour: NodeBehaviour, situation: Situation) -> Iterator[None]:
    """While this lasts, leases in this process encode what ``behaviour`` wants encoded."""
    names = iter([spec.name for spec in manifest.tensors])  # the order in which a lease encodes
    lease: Any = import_module("talkoot.client.trainer.lease")
    real = lease.encode_with_feedback

    def encode(
        delta: Tensor, feedback: Tensor | None, spec: CodecSpec, decay: float
    ) -> tuple[EncodedTensor, Tensor]:
        changed = behaviour.pseudo_gradient(situation, next(names), delta.clone())
        encoded: tuple[EncodedTensor, Tensor] = real(changed, feedback, spec, decay)
        return encoded

    lease.encode_with_feedback = encode
    try:
        yield
    finally:
        lease.encode_with_feedback = real
