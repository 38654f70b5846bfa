"""A second home for artifacts: an object store by URL, each object named by its digest.

The objects are laid out as the files of ``store/`` are (``ab/cdef…``), so a bucket, a folder behind
a web server and a copy of ``store/`` are one and the same kind of mirror to a node. What does the
talking to S3, GCS, Azure, folders and HTTP is obstore (ADR 15).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from talkoot.protocol import limits
from talkoot.protocol.errors import CapacityError, ConfigError, RefusedError, UnavailableError
from talkoot.protocol.files import explain_os_error

if TYPE_CHECKING:
    from talkoot.protocol.artifacts import Slice

READ_ONLY: Final = frozenset({"http", "https"})
SCHEMES: Final = READ_ONLY | {"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "file"}
PART_BYTES: Final = 16 * limits.MIB
"""Of a multipart upload; S3 takes 10,000 of them, and an artifact has at most 4,096."""
PARTS_AT_ONCE: Final = 4
READ_BYTES: Final = 1 * limits.MIB

_OBJECT = re.compile(r"([0-9a-f]{2})/([0-9a-f]{62})")

Pace = Callable[[int], None]
"""Called with the bytes that are about to be sent; may sleep, or raise to end the upload."""


@dataclass(frozen=True)
class StoredObject:
    """One object of ours."""

    digest: str
    size: int  # bytes
    unix: float
    """When it was written."""


class ObjectStore:
    """Artifacts in an object store.

    Args:
        url: ``s3://bucket/prefix``, ``gs://…``, ``az://…``, ``file:///directory``; or ``http(s)://…``
            to read only. Credentials come from the environment, as the cloud's own tools take them.
        endpoint: of an S3-like server that is not Amazon's.
        region: of the bucket.

    Raises:
        ConfigError: the URL is none of these, or obstore is not installed.
    """

    def __init__(self, url: str, *, endpoint: str = "", region: str = "") -> None:
        scheme = urlsplit(url).scheme
        if scheme not in SCHEMES:
            raise ConfigError(
                f"store.url {url!r} is not a place for artifacts: use s3://, gs://, az:// or "
                "file:///.",
                code="store-url",
            )
        try:
            import obstore
            from obstore.store import LocalStore, from_url
        except ImportError as err:
            raise ConfigError(
                "Object stores need one more package: pip install 'talkoot[store]'.",
                code="no-obstore",
            ) from err
        self.url = url
        self.read_only = scheme in READ_ONLY
        self._obstore: Any = obstore
        try:
            if scheme == "file":
                self._store: Any = LocalStore.from_url(url, mkdir=True)
                return
            config: Any = {}
            if scheme in {"s3", "s3a"}:
                if region:
                    config["region"] = region
                if endpoint:
                    config["endpoint"] = endpoint
            options: Any = {"timeout": "120s", "connect_timeout": "10s"}
            if endpoint.startswith("http://") or scheme == "http":
                options["allow_http"] = True
            self._store = from_url(
                url, config=config, client_options=options, retry_config={"max_retries": 3}
            )
        except (obstore.exceptions.BaseError, ValueError, OSError) as err:
            raise ConfigError(
                f"store.url {url!r} cannot be used: {_first_line(err)}.", code="store-url"
            ) from err

    def size(self, digest: str) -> int | None:
        """Bytes of an object, or None if it is not there."""
        try:
            return int(self._obstore.head(self._store, object_path(digest))["size"])
        except FileNotFoundError:
            return None
        except Exception as err:
            raise self._explained(err) from err

    def put(self, digest: str, found: Slice, pace: Pace = lambda _: None) -> None:
        """Write an artifact; it has its name only once it is whole.

        Raises:
            RefusedError: the store does not take it (no bucket, no permission).
            UnavailableError: nobody answers, or the line broke; try again.
            StateError: the artifact cannot be read here.
        """
        try:
            with found.path.open("rb") as file:
                file.seek(found.offset)
                self._obstore.put(
                    self._store,
                    object_path(digest),
                    _paced(file, found.length, pace),
                    use_multipart=found.length > PART_BYTES,
                    chunk_size=PART_BYTES,
                    max_concurrency=PARTS_AT_ONCE,
                )
        except FileNotFoundError as err:
            if err.filename is None:  # obstore's way to say that there is no such bucket
                raise self._explained(err) from err
            raise explain_os_error(err, "copying an artifact", found.path) from err
        except Exception as err:
            raise self._explained(err) from err

    def objects(self) -> Iterator[StoredObject]:
        """All objects whose names are digests."""
        try:
            for batch in self._obstore.list(self._store, chunk_size=1000):
                for entry in batch:
                    match = _OBJECT.fullmatch(entry["path"])
                    if match is not None:
                        yield StoredObject(
                            match[1] + match[2],
                            int(entry["size"]),
                            entry["last_modified"].timestamp(),
                        )
        except Exception as err:
            raise self._explained(err) from err

    def verify(self, digest: str) -> bool | None:
        """Read an object: whether its bytes hash to its name; None if it is not there."""
        hasher = hashlib.sha256()
        try:
            self.read(digest, hasher.update)
        except FileNotFoundError:
            return None
        return hasher.hexdigest() == digest

    def read(self, digest: str, take: Callable[[bytes], object]) -> None:
        """Read an object in pieces, whatever its bytes are.

        Raises:
            FileNotFoundError: it is not there.
            RefusedError, UnavailableError: as in :meth:`put`.
        """
        try:
            got = self._obstore.get(self._store, object_path(digest))
            pieces = iter(got.stream(min_chunk_size=READ_BYTES))
        except FileNotFoundError:
            raise
        except Exception as err:
            raise self._explained(err) from err
        while True:
            try:
                data = next(pieces, None)
            except Exception as err:
                raise self._explained(err) from err
            if data is None:
                return
            take(bytes(data))  # whose errors are its own

    def delete(self, digest: str) -> None:
        """Delete an object; harmless when it is gone."""
        try:
            self._obstore.delete(self._store, object_path(digest))
        except FileNotFoundError:
            pass
        except Exception as err:
            raise self._explained(err) from err

    def _explained(self, err: Exception) -> Exception:
        errors = self._obstore.exceptions
        if isinstance(err, errors.PermissionDeniedError | errors.UnauthenticatedError):
            return RefusedError(
                f"The store {self.url} does not let us ({_first_line(err)}): check its credentials "
                "in the environment and the bucket's policy.",
                code="store-permission",
            )
        # A listing of a bucket that is not there has no error type of its own.
        if isinstance(err, FileNotFoundError) or "NoSuchBucket" in str(err):
            return RefusedError(
                f"The store {self.url} is not there ({_first_line(err)}): make the bucket, or "
                "correct store.url.",
                code="store-missing",
            )
        if isinstance(err, errors.BaseError):
            if "No space left" in str(err) or "StorageFull" in str(err):
                return CapacityError(f"The store {self.url} is full.", code="store-full")
            return UnavailableError(
                f"The store {self.url} did not do it ({_first_line(err)}): it is tried again.",
                code="store-unavailable",
            )
        return err


def object_path(digest: str) -> str:
    """Where an artifact is in a store, and below a mirror's URL: ``ab/cdef…``."""
    return f"{digest[:2]}/{digest[2:]}"


class UploadRate:
    """A pace of at most ``rate`` bytes per second, which also ends an upload when asked to.

    Args:
        rate: None is no limit.
        stop: raises to end the upload.
    """

    def __init__(self, rate: float | None, stop: Callable[[], None]) -> None:
        self._rate = rate
        self._stop = stop
        self._paid_until = 0.0  # monotonic seconds

    def __call__(self, amount: int) -> None:
        """See :data:`Pace`."""
        self._stop()
        if self._rate is None:
            return
        now = time.monotonic()
        self._paid_until = max(self._paid_until, now) + amount / self._rate
        while (left := self._paid_until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            self._stop()


def _paced(file: Any, length: int, pace: Pace) -> Iterator[bytes]:
    while length:
        data = file.read(min(length, READ_BYTES))
        if not data:
            raise UnavailableError("The artifact is shorter than it was: it is tried again.")
        length -= len(data)
        pace(len(data))
        yield data


def _first_line(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return (lines[0] if lines else type(err).__name__)[:300].rstrip(". :")
