"""Copies artifacts to the operator's object store, while rounds go on.

A process of its own, which reads the ledger and the store and writes nothing that a round needs: a
store that is slow, full or gone delays copies and nothing else. Copying again changes nothing, so
the only state is what the store itself says it has.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from talkoot.protocol.artifacts import Slice
from talkoot.protocol.corpus import DIGEST_BYTES, INDEX, TOKENS
from talkoot.protocol.errors import ConfigError, TalkootError, UnavailableError
from talkoot.server.book import Book
from talkoot.server.coordinator import Coordinator
from talkoot.server.objects import ObjectStore, UploadRate

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""How often to look for something new."""
LONGEST_PAUSE_SECONDS = 300.0
"""Between two tries, when the store fails."""
DAY_SECONDS = 86_400.0
INDEX_READ = 4096 * DIGEST_BYTES


class StoppedError(Exception):
    """The copier was asked to stop in the middle of an upload."""


@dataclass
class Copied:
    """What one pass did."""

    objects: int = 0
    bytes: int = 0
    present: int = 0
    """Objects that were there already."""
    deleted: int = 0


@dataclass
class Copier:
    """Brings an object store up to date.

    Args:
        coordinator: open state.
        store: where to copy to.
        should_stop: asked between two pieces of an upload.
    """

    coordinator: Coordinator
    store: ObjectStore
    should_stop: Callable[[], bool] = lambda: False
    _there: set[bytes] | None = None
    _blocks_done: bool = False
    _swept_unix: float = 0.0
    _book: Book = field(init=False)

    def __post_init__(self) -> None:
        if self.store.read_only:
            raise ConfigError(
                f"store.url {self.store.url} can only be read: artifacts are copied to s3://, "
                "gs://, az:// or file:///. Nodes are told of web servers by mirrors.urls.",
                code="store-url",
            )
        self._book = Book(self.coordinator)
        self._pace = UploadRate(self.coordinator.config.store.max_rate, self._check_stop)

    def turn(self) -> Copied:
        """One pass: copy what is not there, newest first.

        Raises:
            TalkootError: the store failed; what was copied by then stays there.
            StoppedError: ``should_stop`` said so.
        """
        done = Copied()
        if self._there is None:
            self._there = {bytes.fromhex(found.digest) for found in self.store.objects()}
        for digest, found in self._wanted():
            self._check_stop()
            self._copy(digest, found, done)
        if self.coordinator.config.store.blocks and not self._blocks_done:
            for digest, found in self._blocks():
                self._check_stop()
                self._copy(digest, found, done)
            self._blocks_done = True
        self._sweep(done)
        return done

    def _copy(self, digest: str, found: Slice, done: Copied) -> None:
        assert self._there is not None
        key = bytes.fromhex(digest)
        if key in self._there:
            done.present += 1
            return
        self.store.put(digest, found, self._pace)
        self._there.add(key)
        done.objects += 1
        done.bytes += found.length

    def _check_stop(self) -> None:
        if self.should_stop():
            raise StoppedError

    def _wanted(self) -> Iterator[tuple[str, Slice]]:
        for digest in self._book.served_digests(self.coordinator.config.round.keep_checkpoints):
            found = self.coordinator.source.lookup(digest)
            if found is not None:  # else it was swept since
                yield digest, found

    def _blocks(self) -> Iterator[tuple[str, Slice]]:
        """The corpus's index and its blocks."""
        corpus, directory = self.coordinator.corpus, self.coordinator.state.corpus
        size = corpus.block_bytes
        number = 0
        with (directory / INDEX).open("rb") as index:
            yield (
                corpus.blocks_index.digest,
                Slice(directory / INDEX, 0, corpus.blocks_index.size_bytes),
            )
            while data := index.read(INDEX_READ):
                for at in range(0, len(data), DIGEST_BYTES):
                    digest = data[at : at + DIGEST_BYTES].hex()
                    yield digest, Slice(directory / TOKENS, number * size, size)
                    number += 1

    def _sweep(self, done: Copied) -> None:
        """Delete what nothing refers to any more, once a day, if the operator said so."""
        days = self.coordinator.config.store.keep_days
        now = time.time()
        if days is None or now < self._swept_unix + DAY_SECONDS:
            return
        self._swept_unix = now
        kept = set(self._book.served_digests(self.coordinator.config.round.keep_checkpoints))
        for found in self.store.objects():
            self._check_stop()
            if found.digest in kept or found.unix > now - days * DAY_SECONDS:
                continue
            # A block is part of the corpus for ever.
            if self.coordinator.corpus_source.lookup(found.digest) is not None:
                continue
            self.store.delete(found.digest)
            done.deleted += 1
            if self._there is not None:
                self._there.discard(bytes.fromhex(found.digest))

    def run(self, wait: Callable[[float], bool]) -> None:
        """Copy until ``wait(seconds)`` (sleeps so long) says that it is time to stop."""
        pause = LOOK_SECONDS
        failing = ""
        while True:
            try:
                done = self.turn()
                if done.objects or done.deleted:
                    log.info(
                        "copied %d objects, %d bytes; deleted %d",
                        done.objects,
                        done.bytes,
                        done.deleted,
                    )
                if failing:
                    self._note("The object store works again.")
                failing, pause = "", LOOK_SECONDS
            except StoppedError:
                return
            except TalkootError as err:
                log.warning("copying: %s", err.sentence)
                if not isinstance(err, UnavailableError):
                    self._there = None  # somebody may have put things in order by hand
                if err.code != failing:
                    self._note(err.sentence)
                failing = err.code
                pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)
            if wait(pause):
                return

    def _note(self, sentence: str) -> None:
        with contextlib.suppress(TalkootError):
            self._book.note("store", sentence)


def open_store(coordinator: Coordinator) -> ObjectStore:
    """The operator's object store. Raises :class:`ConfigError` when there is none."""
    section = coordinator.config.store
    if not section.url:
        raise ConfigError(
            f"No object store is configured: set store.url in {coordinator.state.config}.",
            code="no-store",
        )
    return ObjectStore(section.url, endpoint=section.endpoint, region=section.region)


def verify_store(
    coordinator: Coordinator, store: ObjectStore, say: Callable[[str], None]
) -> tuple[int, int, int]:
    """Read back from ``store`` all that nodes may ask for; returns (right, missing, wrong)."""
    right = missing = wrong = 0
    book = Book(coordinator)
    for digest in book.served_digests(coordinator.config.round.keep_checkpoints):
        verdict = store.verify(digest)
        if verdict is None:
            missing += 1
            say(f"missing: {digest}")
        elif verdict:
            right += 1
        else:
            wrong += 1
            say(f"WRONG: {digest} holds other bytes than its name says")
    return right, missing, wrong
