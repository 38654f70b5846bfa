"""What an arm stands on: the operator's configuration, and all that follows from it.

The lab takes the same ``Config`` as ``talkoot-coordinator init``, so that whatever is found here
can be written into an operator's file word for word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talkoot.protocol.corpus import (
    MANIFEST,
    CorpusManifest,
    Tokens,
    load_heldout,
    read_block,
    read_manifest,
)
from talkoot.protocol.errors import ConfigError
from talkoot.protocol.manifest import Manifest, manifest_of
from talkoot.protocol.messages import ArtifactRef, CodecSpec, RunSpec
from talkoot.protocol.model import build_model, config_bytes, named_trainable
from talkoot.protocol.replica import Replica
from talkoot.protocol.tokenizer import load_tokenizer
from talkoot.server.config import Config, begun
from talkoot.server.corpus import build_corpus
from talkoot.server.heldout import heldout_loss, heldout_rows
from talkoot.server.setup import initial_model
from talkoot.server.warm_up import warm_up

RUN_ID = "lab"
CORPUS_SEED = 0
"""Of the held-out split. The seed of a run changes weights and order of the data, not the measure:
losses of different seeds are then losses on the same text."""


@dataclass(frozen=True)
class Shard:
    """A corpus on disk. Most networks have one; nodes with text of their own have several."""

    directory: Path
    manifest: CorpusManifest
    digest: str

    @classmethod
    def open(cls, directory: Path) -> Shard:
        """Read a finished corpus. Raises :class:`CorpusError` when there is none."""
        digest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
        return cls(directory, read_manifest(directory), digest)

    def block(self, number: int) -> Tokens:
        """(block_tokens,) ids of one block, in memory of their own."""
        return read_block(self.directory, self.manifest, number)


@dataclass(frozen=True)
class World:
    """All that the arms of one seed share, and that none of them changes."""

    config: Config
    shards: tuple[Shard, ...]
    model_config: dict[str, Any]
    manifest: Manifest
    initial: dict[str, Tensor]
    """Version 0, by name."""
    heldout: Tensor
    """(sequences, sequence_length) int64: the held-out text that losses are measured on."""
    before: tuple[float, ...] = ()
    """Held-out losses while version 0 was trained (``[warm_up]``), after each lease's worth."""

    def spec(self, shard: int = 0) -> RunSpec:
        """The run as a node of ``shard`` is told of it."""
        config = self.config
        return RunSpec(
            run_id=RUN_ID,
            model=_ref(config_bytes(self.model_config)),
            manifest=_ref(self.manifest.to_bytes()),
            corpus=ArtifactRef(
                digest=self.shards[shard].digest,
                size_bytes=(self.shards[shard].directory / MANIFEST).stat().st_size,
            ),
            parameters=self.manifest.parameters,
            sequence_length=config.model.sequence_length,
            micro_batch=config.model.micro_batch,
            inner=begun(config),
            uplink=config.uplink,
            downlink=CodecSpec(**config.downlink.model_dump()),
            feedback_decay=config.feedback_decay,
            feedback_start=config.feedback_start,
            seed=config.run.seed,
        )

    def blank_model(self) -> torch.nn.Module:
        """A model whose parameters are not set."""
        return build_model(self.model_config, seed=None, device="cpu")


def _ref(data: bytes) -> ArtifactRef:
    return ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def make_world(
    config: Config,
    corpora: Sequence[Path],
    *,
    heldout_tokens: int,
    heldout_from: Path | None = None,
) -> World:
    """Build the initial model and read the corpora.

    Args:
        config: an operator's; addresses, admission and ledger are not read.
        corpora: directories of :func:`make_corpus`, one a shard.
        heldout_tokens: tokens that losses are measured on.
        heldout_from: the corpus that they are taken from; all shards in equal parts if not given.

    Raises:
        ConfigError: model and tokenizer do not fit together, or the shards do not.
    """
    shards = tuple(Shard.open(directory) for directory in corpora)
    model_config, model = initial_model(config)
    vocabulary = max(shard.manifest.tokenizer.vocab_size for shard in shards)
    if int(model_config.get("vocab_size", 0)) < vocabulary:
        raise ConfigError(
            f"The tokenizer has {vocabulary} ids and the model knows fewer: choose a model whose "
            "vocab_size is at least as large."
        )
    initial = {name: p.detach().clone() for name, p in named_trainable(model)}
    length = config.model.sequence_length
    measured = shards if heldout_from is None else (Shard.open(heldout_from),)
    rows = [
        heldout_rows(load_heldout(s.directory, s.manifest), length, heldout_tokens // len(measured))
        for s in measured
    ]
    world = World(
        config=config,
        shards=shards,
        model_config=model_config,
        manifest=manifest_of(initial.items()),
        initial=initial,
        heldout=torch.cat(rows),
    )
    return _warmed_up(world) if config.warm_up.tokens else world


def _warmed_up(world: World) -> World:
    """The same with version 0 trained as ``init`` does it."""
    losses: list[float] = []

    def after(replica: Replica) -> None:
        losses.append(heldout_loss(replica.model, world.heldout))

    weights = warm_up(
        world.model_config,
        world.initial.__getitem__,
        world.config,
        world.spec(),
        (world.shards[0].directory, world.shards[0].manifest),
        say=lambda _: None,
        after=after,
    )
    return replace(world, initial=weights, before=tuple(losses))


def make_corpus(config: Config, cache: Path, sources: Sequence[str] | None = None) -> Path:
    """The corpus of ``config`` (or of other ``sources``), built on first use and kept in ``cache``.

    Raises :class:`CorpusError` as ``build_corpus`` does.
    """
    section, tokenizer = config.corpus, config.tokenizer
    chosen = list(sources if sources is not None else section.sources)
    key = json.dumps(
        [chosen, section.block_tokens, section.heldout_fraction, section.encoding, tokenizer.path]
    )
    directory = cache / f"corpus-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (directory / MANIFEST).is_file():
        path = Path(tokenizer.path) if tokenizer.path is not None else None
        build_corpus(
            chosen,
            load_tokenizer(tokenizer.kind, path),
            directory,
            block_tokens=section.block_tokens,
            heldout_fraction=section.heldout_fraction,
            seed=CORPUS_SEED,
            encoding=section.encoding,
        )
    return directory
