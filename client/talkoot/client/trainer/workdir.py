"""What the trainer keeps on disk, and how it stays whole: two small pointers to immutable files.

::

    state.json        the replica's pointer: published weights, feedback, moments, a finished lease
    checkpoint.json   the pointer of a lease in progress: local weights, moments, where it is
    tensors/          safetensors files, each written once under a fresh name
    leases/<id>/      payload.safetensors of a finished lease that is not settled yet

A pointer is replaced atomically once every file that it names is on disk, so a crash at any moment
leaves the old state or the new one. Files that no pointer names are swept. No torch here.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from talkoot.client.caps import require_room
from talkoot.protocol import limits
from talkoot.protocol.errors import ProtocolError, StateError
from talkoot.protocol.files import fsync_dir, write_atomic
from talkoot.protocol.messages import (
    Count,
    Digest,
    Finite,
    LeaseId,
    M,
    Message,
    RunId,
    Seconds,
    canonical_bytes,
    parse,
)

FileName = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,100}\.safetensors$")]
RecipeName = Annotated[str, Field(max_length=64)]
PAYLOAD: Final = "payload.safetensors"
_POINTER_CAP: Final = 64 * limits.KIB


class Published(Message):
    """The replica: dense published weights of one version."""

    version: Count
    digest: Digest
    file: FileName


class Moments(Message):
    """The inner optimizer's state after ``steps`` steps."""

    file: FileName
    steps: Count
    recipe: RecipeName = "fp32-adamw"
    """Whose state it is."""


class Fall(Message):
    """Memory ran out, and the node went on with a smaller recipe."""

    before: RecipeName
    after: RecipeName
    lease_id: LeaseId | None
    """None: in a proof."""
    step: Count
    """Of the lease's steps, those that were kept."""


class LeaseResult(Message):
    """A finished lease; its payload is on disk until the lease is settled."""

    lease_id: LeaseId
    digest: Digest
    size: Count
    """Bytes of the payload."""
    tokens: Count
    steps: Count
    loss: Finite
    training_seconds: Seconds


class State(Message):
    """``state.json``."""

    format: Literal[1] = 1
    run_id: RunId
    manifest_digest: Digest
    published: Published | None = None
    feedback: FileName | None = None
    """Error feedback, fp32, in the manifest's shapes; ``None`` is all zeros."""
    moments: Moments | None = None
    done: LeaseResult | None = None
    falls: Annotated[tuple[Fall, ...], Field(max_length=64)] = ()
    """Since the node was given the recipe that it began with; the first one's ``before``."""


class Checkpoint(Message):
    """``checkpoint.json``: a lease after ``step`` of ``steps`` inner steps.

    Steps are the optimizer's, under the recipe of the moments; batches are what they are made of
    (``steps.py``), and the same under each recipe.
    """

    format: Literal[1] = 1
    lease_id: LeaseId
    base_digest: Digest
    step: Count
    steps: Count
    batch: Count | None = None
    """Batches that are done. None: of a version in which each batch was a step."""
    batches: Count | None = None
    loss_sum: Finite
    """Sum over the sequences done so far of their step's loss."""
    training_seconds: Seconds
    local: FileName
    moments: Moments

    @property
    def batches_done(self) -> int:
        """Of the lease's batches, those that are in."""
        return self.step if self.batch is None else self.batch

    @property
    def all_batches(self) -> int:
        """Of the lease."""
        return self.steps if self.batches is None else self.batches


class WorkDir:
    """The trainer's directory for one run.

    Its parent is the node's home, to which ``max_disk`` (bytes) applies.

    Raises :class:`StateError` when the directory belongs to another run or model, or is damaged.
    """

    def __init__(
        self, root: Path, run_id: str, manifest_digest: str, *, max_disk: int | None = None
    ) -> None:
        self.root: Final = root
        self._max_disk = max_disk
        self._tensors = root / "tensors"
        self._leases = root / "leases"
        self._tensors.mkdir(parents=True, exist_ok=True)
        self._leases.mkdir(exist_ok=True)
        state = _read(root / "state.json", State)
        if state is None:
            state = State(run_id=run_id, manifest_digest=manifest_digest)
        if (state.run_id, state.manifest_digest) != (run_id, manifest_digest):
            raise StateError(
                f"{root} holds a replica of run {state.run_id}, not of {run_id} with this model: "
                "use another directory, or delete this one to start over.",
                code="other-run",
            )
        if state.published is not None and not self.path(state.published.file).is_file():
            state = state.model_copy(update={"published": None})  # sync fetches it anew
        self.state = state
        self.checkpoint = _read(root / "checkpoint.json", Checkpoint)
        done = state.done
        if self.checkpoint is not None and done and self.checkpoint.lease_id == done.lease_id:
            # We died between the two pointers: the lease is done, its moments are in the state.
            self.drop_checkpoint()
        self.sweep()

    def path(self, file: str) -> Path:
        """Where a tensor file is."""
        return self._tensors / file

    def fresh(self, kind: str) -> str:
        """A name that no file has had."""
        return f"{kind}-{secrets.token_hex(8)}.safetensors"

    def require_room(self, size: int) -> None:
        """See that a file of ``size`` bytes stays under the cap on all of the node's files.

        Raises:
            CapacityError: code ``"over-max-disk"``: it does not.
        """
        require_room(self.root.absolute().parent, size, self._max_disk)

    def payload_path(self, lease_id: str) -> Path:
        """Where the payload of a lease is or will be; its directory exists afterwards."""
        directory = self._leases / lease_id
        directory.mkdir(exist_ok=True)
        return directory / PAYLOAD

    def commit(self, state: State) -> None:
        """Make ``state`` current, atomically, then delete what nothing names any more."""
        write_atomic(self.root / "state.json", canonical_bytes(state), mode=0o600)
        self.state = state
        if state.done and self.checkpoint and self.checkpoint.lease_id == state.done.lease_id:
            self.drop_checkpoint()
        self.sweep()

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Make ``checkpoint`` current, atomically."""
        write_atomic(self.root / "checkpoint.json", canonical_bytes(checkpoint), mode=0o600)
        self.checkpoint = checkpoint
        self.sweep()

    def drop_checkpoint(self) -> None:
        """Forget the lease in progress."""
        self.checkpoint = None
        (self.root / "checkpoint.json").unlink(missing_ok=True)
        fsync_dir(self.root)

    def sweep(self) -> None:
        """Delete tensor files and lease directories that no pointer names, and temporaries."""
        state, checkpoint = self.state, self.checkpoint
        keep = {state.feedback}
        if state.published is not None:
            keep.add(state.published.file)
        if state.moments is not None:
            keep.add(state.moments.file)
        if checkpoint is not None:
            keep |= {checkpoint.local, checkpoint.moments.file}
        for file in self._tensors.iterdir():
            if file.name not in keep:
                file.unlink(missing_ok=True)
        for directory in self._leases.iterdir():
            if state.done is None or directory.name != state.done.lease_id:
                shutil.rmtree(directory, ignore_errors=True)


def _read(path: Path, kind: type[M]) -> M | None:
    try:
        with path.open("rb") as file:
            data = file.read(_POINTER_CAP + 1)
    except FileNotFoundError:
        return None
    try:
        return parse(kind, data, cap=_POINTER_CAP)
    except ProtocolError as err:
        raise StateError(
            f"{path} is damaged or was written by another version ({err.sentence}): delete "
            f"{path.parent} and the node fetches the replica anew.",
            code="damaged",
        ) from err
