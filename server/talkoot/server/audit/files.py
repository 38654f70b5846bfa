"""The files held against the ledger: artifacts by their bytes, versions by the whole chain.

A torch module. The chain is computed tensor by tensor: one tensor is taken from a checkpoint and
carried through every update that is kept, and its digest noted at each version. Memory is set by
the largest tensor, and nothing is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from talkoot.protocol.errors import StateError, TalkootError
from talkoot.protocol.manifest import Manifest, digest_of_table
from talkoot.protocol.messages import RunSpec
from talkoot.protocol.payload import PayloadReader
from talkoot.protocol.weights import WeightsReader, add_sparse
from talkoot.server.audit.findings import Audit
from talkoot.server.audit.reading import Row

READ_BYTES = 1 << 20
VERSION_DIRS = 2
"""The newest so many versions have their published weights and feedback on disk."""


@dataclass
class Files:
    """A store and version directories, and what of them was hashed already.

    ``hashed`` maps an artifact's digest to (inode, size, mtime in ns) when it was found whole: a
    repeated audit reads it again only if that changed. ``reached`` is the newest version whose
    weights were computed by an earlier audit, with its digest.
    """

    root: Path
    hashed: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    reached: dict[int, str] = field(default_factory=dict)

    def path(self, digest: str) -> Path:
        """Where an artifact is."""
        return self.root / "store" / digest[:2] / digest[2:]

    def whole(self, audit: Audit, where: str, digest: str, size: int | None) -> bool | None:
        """Whether the artifact's bytes hash to its name: None when it is not there."""
        path = self.path(digest)
        try:
            stat = path.stat()
            mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self.hashed.get(digest) == mark:
                return True
            sha = hashlib.sha256()
            with path.open("rb") as file:
                while data := file.read(READ_BYTES):
                    sha.update(data)
        except FileNotFoundError:
            return None
        except OSError as err:
            audit.find("unreadable", where, f"{path} cannot be read: {err.strerror}.")
            return False
        audit.artifacts += 1
        if sha.hexdigest() != digest or (size is not None and stat.st_size != size):
            audit.find("damaged-artifact", where, f"{path} does not have the bytes of its name.")
            return False
        self.hashed[digest] = mark
        return True


def check_files(
    audit: Audit,
    files: Files,
    spec: RunSpec,
    manifest: Manifest,
    versions: Sequence[Row],
    pending: Sequence[Row],
    *,
    keep_checkpoints: int,
    moved_on: Callable[[], bool],
) -> None:
    """Artifacts that must be there, then the chain of weights, then the newest version's files.

    Args:
        versions: rows in order.
        pending: contributions that no version holds yet.
        keep_checkpoints: how many dense checkpoints the operator keeps.
        moved_on: whether the ledger has newer versions by now, so that files may have gone.
    """
    for name in ("model", "manifest", "corpus"):
        ref = getattr(spec, name)
        if files.whole(audit, f"the run's {name}", ref.digest, ref.size_bytes) is None:
            audit.find("missing-artifact", f"the run's {name}", f"{files.path(ref.digest)}")
    for row in pending:
        where = f"contribution {row['lease_id']}"
        found = files.whole(audit, where, row["payload_digest"], row["payload_bytes"])
        if found is None and not moved_on():
            audit.find("missing-artifact", where, "Its payload is gone before it was aggregated.")
    checkpoints = [v["version"] for v in versions if v["checkpoint_digest"] is not None]
    oldest = checkpoints[-keep_checkpoints:][0]
    usable: set[tuple[int, str]] = set()
    for version in versions:
        number = version["version"]
        for kind in ("update", "checkpoint"):
            digest = version[f"{kind}_digest"]
            if digest is None:
                continue
            where = f"{kind} of version {number}"
            found = files.whole(audit, where, digest, version[f"{kind}_bytes"])
            if found:
                usable.add((number, kind))
            needed = number >= oldest if kind == "checkpoint" else number > oldest
            if found is None and needed and not moved_on():
                audit.find("missing-artifact", where, f"{files.path(digest)} is not there.")
    _check_chain(audit, files, spec, manifest, versions, usable)
    _check_directories(audit, files, manifest, versions, moved_on)


def _check_chain(
    audit: Audit,
    files: Files,
    spec: RunSpec,
    manifest: Manifest,
    versions: Sequence[Row],
    usable: set[tuple[int, str]],
) -> None:
    """Compute every version's weights that can still be computed."""
    segments: list[list[Row]] = []
    whole = False  # whether the last segment goes on
    for version in versions:
        number = version["version"]
        if whole and (number, "update") in usable:
            segments[-1].append(version)
        elif (number, "checkpoint") in usable:
            segments.append([version])
            whole = True
        else:
            audit.collected.append(number)
            whole = False
    for segment in segments:
        # What an earlier audit computed is not computed again, from its last checkpoint on.
        known = [
            place
            for place, version in enumerate(segment)
            if (version["version"], "checkpoint") in usable and _reached(files, version)
        ]
        start = known[-1] if known else 0
        audit.chain_verified += [version["version"] for version in segment[:start]]
        _check_segment(audit, files, spec, manifest, segment[start:], usable)


def _reached(files: Files, version: Row) -> bool:
    return bool(files.reached.get(version["version"]) == version["weights_digest"])


def _check_segment(
    audit: Audit,
    files: Files,
    spec: RunSpec,
    manifest: Manifest,
    segment: Sequence[Row],
    usable: set[tuple[int, str]],
) -> None:
    tables: list[dict[str, str]] = [{} for _ in segment]
    try:
        start = WeightsReader(files.path(segment[0]["checkpoint_digest"]), manifest)
        updates = [
            PayloadReader(files.path(v["update_digest"]), manifest, spec.downlink)
            for v in segment[1:]
        ]
        for tensor_spec in manifest.tensors:
            name = tensor_spec.name
            tensor = start.get(name)
            tables[0][name] = _digest(tensor)
            for update, table in zip(updates, tables[1:], strict=True):
                tensor = add_sparse(tensor, update.decode(name))
                table[name] = _digest(tensor)
    except TalkootError as err:
        # A file that was collected while we read it is no broken promise; a damaged one was found.
        if not isinstance(err, StateError):
            audit.find("broken-chain", f"version {segment[0]['version']} and on", err.sentence)
        return
    for version, table in zip(segment, tables, strict=True):
        number = version["version"]
        if digest_of_table(manifest, table) != version["weights_digest"]:
            audit.find(
                "broken-chain",
                f"version {number}",
                "The updates do not lead to the weights that the ledger names.",
            )
            return
        audit.chain_verified.append(number)
        files.reached[number] = version["weights_digest"]
        if (number, "checkpoint") in usable and version is not segment[0]:
            _check_dense(
                audit,
                manifest,
                files.path(version["checkpoint_digest"]),
                f"checkpoint of version {number}",
                version["weights_digest"],
            )


def _check_directories(
    audit: Audit,
    files: Files,
    manifest: Manifest,
    versions: Sequence[Row],
    moved_on: Callable[[], bool],
) -> None:
    """The newest version's own files: what the next round starts from."""
    newest = versions[-1]
    directory = files.root / "versions" / str(newest["directory"])
    where = f"files of version {newest['version']}"
    before = len(audit.findings)
    _check_dense(
        audit, manifest, directory / "published.safetensors", where, newest["weights_digest"]
    )
    try:
        if newest["version"] > 0:  # the first one has none
            WeightsReader(directory / "feedback.safetensors", manifest.as_float32())
    except TalkootError as err:
        audit.find("damaged-version", where, err.sentence)
    if len(audit.findings) > before and moved_on():
        del audit.findings[before:]


def _check_dense(audit: Audit, manifest: Manifest, path: Path, where: str, digest: str) -> None:
    try:
        found = WeightsReader(path, manifest).weights_digest()
    except TalkootError as err:
        audit.find("damaged-version", where, err.sentence)
        return
    if found != digest:
        audit.find("damaged-version", where, f"{path} is not the weights that the ledger names.")


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, by the auditor's own hand: row-major, little-endian."""
    import torch

    flat = tensor.contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
