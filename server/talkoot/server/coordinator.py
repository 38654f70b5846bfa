"""What every part of a running coordinator opens first: configuration, keys, ledger, store."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select

from talkoot.protocol.artifacts import ArtifactStore, ChainSource
from talkoot.protocol.corpus import CorpusManifest, CorpusSource
from talkoot.protocol.errors import StateError
from talkoot.protocol.identity import NodeKey, read_small
from talkoot.protocol.limits import MAX_JSON_ARTIFACT
from talkoot.protocol.messages import RunSpec, Signed, parse
from talkoot.server.config import Config, load_config
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import Event, Run
from talkoot.server.state import StateDir
from talkoot.server.trust import Trust, load_trust, stamp

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from talkoot.protocol.manifest import Manifest


@dataclass(frozen=True)
class Coordinator:
    """One operator's state, open."""

    state: StateDir
    config: Config
    ledger: Ledger
    key: NodeKey
    store: ArtifactStore
    run_id: str
    rounds_total: int
    signed_spec: Signed
    spec: RunSpec
    generation: int
    """How often this run was restored, in effect: it stands in everything that is signed."""
    _trust: dict[tuple[int, int], Trust] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, root: Path) -> Coordinator:
        """Open a finished state directory. Raises :class:`TalkootError` with one sentence."""
        state = StateDir(root.resolve())
        run_id = state.check()
        config = load_config(state.config)
        ledger = Ledger(Ledger.url_at(state.root, config.ledger.url))
        ledger.migrate()
        with ledger.read() as session:
            run = session.scalars(select(Run).where(Run.run_id == run_id)).one_or_none()
        if run is None:
            ledger.close()
            raise StateError(
                f"The ledger does not know run {run_id}, which {state.root} is about: restore the "
                "ledger from a backup, or correct ledger.url.",
                code="run-unknown",
            )
        signed = parse(Signed, run.spec.encode("ascii"))
        return cls(
            state=state,
            config=config,
            ledger=ledger,
            key=NodeKey.load(state.coordinator_key),
            store=ArtifactStore(state.store),
            run_id=run_id,
            rounds_total=run.rounds_total,
            signed_spec=signed,
            spec=parse(RunSpec, signed.body.encode("ascii")),
            generation=run.generation,
        )

    def trust(self) -> Trust:
        """The CAs as they stand now; read again only after a change."""
        stamped = stamp(self.state.ca)
        known = self._trust.get(stamped)
        if known is None:
            known = load_trust(self.state.ca)
            self._trust.clear()
            self._trust[stamped] = known
        return known

    @property
    def ca_pem(self) -> bytes:
        """The CAs that nodes trust, one PEM after the other."""
        return self.trust().bundle_pem

    @property
    def loopback_ca_pem(self) -> bytes:
        """The CA of the SuperLink, which nobody outside this machine talks to."""
        return read_small(self.state.loopback_ca, "opening the SuperLink's CA")

    @cached_property
    def manifest(self) -> Manifest:
        """Names, shapes and dtypes of the model's parameters."""
        from talkoot.protocol.manifest import Manifest

        return Manifest.from_bytes(self.store.path(self.spec.manifest.digest).read_bytes())

    @property
    def base(self) -> Path | None:
        """The frozen weights of an adapter run."""
        adapter = self.spec.adapter
        return self.store.path(adapter.base.digest) if adapter is not None else None

    @cached_property
    def corpus(self) -> CorpusManifest:
        """What the training blocks are."""
        data = self.store.path(self.spec.corpus.digest).read_bytes()
        return parse(CorpusManifest, data, cap=MAX_JSON_ARTIFACT)

    @cached_property
    def corpus_source(self) -> CorpusSource:
        """The corpus's blocks, index and manifest by digest."""
        return CorpusSource(self.state.corpus)

    @cached_property
    def source(self) -> ChainSource:
        """All that nodes may fetch: artifacts and blocks."""
        return ChainSource([self.store, self.corpus_source])

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()


def note(session: Session, kind: str, sentence: str) -> None:
    """Put an event on record, inside the transaction that it belongs to."""
    session.add(Event(unix=time.time(), kind=kind, sentence=sentence))
