"""What a bad disk has torn of a trainer's own files is let go, and the node works on without it.

Published weights have a digest, and are fetched anew when they differ. What only this node has
(error feedback, optimizer state, a checkpoint within a lease) cannot be had again: a file of it
that is not well-formed any more is dropped with a line in the log, as if it had never been. A bit
that flips inside such a file is not noticed; nothing but this node's own learning depends on it,
and values that are not finite are refused when they are encoded. Zeros where a power cut left them
are, in the moments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from talkoot.client.trainer.tensors import open_tensors
from talkoot.client.trainer.workdir import Moments, WorkDir
from talkoot.protocol.errors import ProtocolError, StateError
from talkoot.protocol.manifest import Manifest
from talkoot.protocol.replica import Replica
from talkoot.protocol.rules import FIRST, SECOND
from talkoot.protocol.weights import WeightsReader

log = logging.getLogger(__name__)

_SLICE = 2**20  # elements
_UNDERFLOW = 1e-15
"""The square of a smaller one may be zero in fp32."""


def drop_damaged(work: WorkDir, manifest: Manifest, replica: Replica) -> None:
    """Drop feedback, moments and checkpoint that cannot be read: headers and sizes are checked."""
    state = work.state
    changes: dict[str, None] = {}
    if state.feedback is not None and not _weights(work.path(state.feedback), manifest):
        changes["feedback"] = None
    if not _moments(work, state.moments, replica):
        changes["moments"] = None
    if changes:
        log.warning("damaged, and begun anew: %s", ", ".join(changes))
        work.commit(state.model_copy(update=changes))
    checkpoint = work.checkpoint
    if checkpoint is None:
        return
    other = checkpoint.moments.recipe != replica.recipe.name
    whole = _opens(lambda: open_tensors(work.path(checkpoint.local), replica.weights(), cast=other))
    if not whole or not _moments(work, checkpoint.moments, replica):
        log.warning("the checkpoint is damaged: lease %s begins anew", checkpoint.lease_id)
        work.drop_checkpoint()


def believable(states: Sequence[tuple[str, Tensor]]) -> bool:
    """Whether moments can be an optimizer's: none is remembered whose square is not.

    A part of the file that a power cut left as zeros would make a step without bounds of what is
    remembered, and the contribution be refused.
    """
    by_name = dict(states)
    for name, first in states:
        second = by_name.get(name.replace(f"{FIRST}:", f"{SECOND}:"))
        if not name.startswith(f"{FIRST}:") or second is None or not first.is_floating_point():
            continue  # factored, or in few bits: those have scales of their own
        m, v = first.flatten(), second.flatten()
        for at in range(0, len(m), _SLICE):
            lost = (v[at : at + _SLICE] == 0) & (m[at : at + _SLICE].abs() > _UNDERFLOW)
            if bool(lost.any()):
                return False
    return True


def _moments(work: WorkDir, moments: Moments | None, replica: Replica) -> bool:
    if moments is None or moments.recipe != replica.recipe.name:
        return True  # there is nothing that would be read
    return _opens(lambda: open_tensors(work.path(moments.file), replica.state()))


def _weights(path: Path, manifest: Manifest) -> bool:
    return _opens(lambda: WeightsReader(path, manifest.as_float32()))


def _opens(look: Callable[[], object]) -> bool:
    try:
        look()
    except (ProtocolError, StateError) as err:
        log.warning("%s", err.sentence)
        return False
    return True
