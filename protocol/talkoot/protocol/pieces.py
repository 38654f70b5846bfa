"""The SHA-256 of each piece of an artifact: what tells, while bytes stream in, which are wrong.

An artifact's digest can be checked only when the last byte is here. 28 GB from a mirror that lies
would be noticed after 28 GB; with the list of pieces, which comes from the coordinator, it is
noticed after one (16 MiB), and what was right before it is kept.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from talkoot.protocol import limits
from talkoot.protocol.artifacts import Slice
from talkoot.protocol.errors import ProtocolError, UnavailableError
from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.protocol.ingest import READ_BYTES, check_size

DIGEST_BYTES: Final = 32
KEPT_LISTS: Final = 64
"""Lists that a :class:`PieceShelf` keeps; the oldest goes, and is made again when asked for."""


def piece_count(size: int) -> int:
    """Pieces of an artifact of ``size`` bytes; the last may be shorter."""
    return -(-size // limits.PIECE)


@dataclass(frozen=True)
class Pieces:
    """The piece digests of one artifact.

    Raises:
        ProtocolError: not one digest a piece, or the size is over ``limits.MAX_ARTIFACT``.
    """

    size: int
    """Bytes of the artifact."""
    digests: bytes
    """32 bytes for each piece, in order."""

    def __post_init__(self) -> None:
        if len(self.digests) != DIGEST_BYTES * piece_count(check_size(self.size)):
            raise ProtocolError(
                f"A list of {len(self.digests)} bytes is not one digest for each piece of "
                f"{self.size} bytes.",
                code="malformed",
            )

    def digest(self, number: int) -> bytes:
        """The SHA-256 (32 bytes) of a piece."""
        return self.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]

    def end(self, number: int) -> int:
        """The offset at which a piece ends."""
        return min(self.size, (number + 1) * limits.PIECE)

    @classmethod
    def of(cls, found: Slice) -> Pieces:
        """Read an artifact once and list its pieces, in constant memory.

        Raises:
            UnavailableError: it became shorter while it was read.
            StateError: it cannot be read.
        """
        digests = bytearray()
        try:
            with found.path.open("rb", buffering=0) as file:
                file.seek(found.offset)
                for number in range(piece_count(found.length)):
                    left = min(limits.PIECE, found.length - number * limits.PIECE)
                    hasher = hashlib.sha256()
                    while left:
                        data = file.read(min(left, READ_BYTES))
                        if not data:
                            raise UnavailableError(
                                "The artifact is shorter than it was: try again later."
                            )
                        hasher.update(data)
                        left -= len(data)
                    digests += hasher.digest()
        except OSError as err:
            raise explain_os_error(err, "listing an artifact's pieces", found.path) from err
        return cls(found.length, bytes(digests))


class PieceShelf:
    """Piece lists of the artifacts that were asked for, kept as files below ``directory``.

    One list is made at a time: to hash a 28 GB checkpoint takes its disk's time and a core.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._making = threading.Lock()

    def get(self, digest: str, found: Slice) -> Pieces:
        """The pieces of the artifact ``digest``, whose bytes are at ``found``. Errors as ``of``."""
        path = self._directory / digest
        held = self._held(path, found.length)
        if held is not None:
            return held
        with self._making:
            held = self._held(path, found.length)
            if held is not None:
                return held
            pieces = Pieces.of(found)
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                write_atomic(path, pieces.digests)
                self._trim()
            except OSError as err:
                raise explain_os_error(err, "keeping a list of pieces", path) from err
            return pieces

    def _held(self, path: Path, size: int) -> Pieces | None:
        try:
            return Pieces(size, path.read_bytes())
        except (FileNotFoundError, ProtocolError):
            return None
        except OSError as err:
            raise explain_os_error(err, "reading a list of pieces", path) from err

    def _trim(self) -> None:
        lists = sorted(self._directory.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in lists[:-KEPT_LISTS]:
            path.unlink(missing_ok=True)
