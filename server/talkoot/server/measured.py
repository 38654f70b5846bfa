"""What nodes measured corrects what is predicted for others of their kind. Pure.

A kind is a device's name, its driver, its torch and the recipe. Where at least one node of a kind
has proved itself, predictions for it are multiplied with the median of measured over predicted. A
liar can move it by no more than the bounds below, and others of its kind outvote it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from talkoot.protocol.messages import Capability, Proof, Signed, parse
from talkoot.protocol.planner.choose import Ratio

LEAST: Final = 0.9
MOST: Final = 1.3
"""Beyond these a ratio is a mistake or a lie, and not a device's way."""
WORTH_BYTES: Final = 256 * 2**20
"""Of smaller predictions the noise of a process (libraries, buffers) is the larger part."""
MAX_PROOFS_READ: Final = 500
"""The newest of the ledger."""

Kind = tuple[str, str, str, str]


def kind_of(has: Capability) -> Kind:
    """What machines have in common that takes memory."""
    return (has.device, has.device_name, has.driver, has.torch_version)


@lru_cache(maxsize=2 * MAX_PROOFS_READ)  # each is read again for every node that comes
def parse_proof(signed: str) -> Proof:
    """The proof in what a node signed, as the ledger keeps it."""
    body = parse(Signed, signed.encode("ascii")).body
    return parse(Proof, body.encode("ascii"))


def ratios(proofs: Iterable[tuple[str, Proof]], kind: Kind) -> Ratio:
    """Measured over predicted by recipe, for one kind of machine.

    Args:
        proofs: (node, accepted proof), newest first; of each node and recipe the first counts.
    """
    seen = set[tuple[str, str]]()
    found: dict[str, list[float]] = {}
    for node, proof in proofs:
        if kind_of(proof.capability) != kind or (node, proof.recipe) in seen:
            continue
        seen.add((node, proof.recipe))
        if proof.predicted_bytes >= WORTH_BYTES:
            measured = proof.peak_bytes / proof.predicted_bytes
            found.setdefault(proof.recipe, []).append(min(max(measured, LEAST), MOST))
    medians = {recipe: statistics.median(values) for recipe, values in found.items()}
    return lambda recipe: medians.get(recipe, 1.0)
