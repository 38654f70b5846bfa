"""What a bad disk has torn of a trainer's own files is let go, and the node works on without it.

Published weights have a digest, and are fetched anew when they differ. What only this node has
(error feedback, optimizer state, a checkpoint within a lease) cannot be had again: a file of it
that is not well-formed any more is dropped with a line in the log, as if it had never been. A bit
that flips inside such a file is not noticed; nothing but this node's own learning depends on it,
and values that are not finite are refused when they are encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from talkoot.client.trainer.tensors import open_tensors
from talkoot.client.trainer.workdir import Moments, WorkDir
from talkoot.protocol.errors import ProtocolError, StateError
from talkoot.protocol.manifest import Manifest
from talkoot.protocol.replica import Replica
from talkoot.protocol.weights import WeightsReader

log = logging.getLogger(__name__)


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
