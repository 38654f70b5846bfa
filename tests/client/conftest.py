"""A run of one nano model on real text, for the tests of the trainer."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from talkoot.protocol.corpus import CorpusManifest, TokenizerSpec
from talkoot.protocol.leases import lease_id
from talkoot.protocol.manifest import Manifest, manifest_of
from talkoot.protocol.messages import (
    ArtifactRef,
    BlockRef,
    CodecSpec,
    InnerSpec,
    Lease,
    RoundTask,
    RunSpec,
    VersionRef,
    canonical_bytes,
)
from talkoot.protocol.model import build_model, config_bytes, named_trainable, preset
from talkoot.protocol.weights import save_weights

NODE = "0123456789abcdef"
BLOCK_TOKENS = 512
SEQUENCE = 64


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _ref(data: bytes) -> ArtifactRef:
    return ArtifactRef(digest=_sha(data), size_bytes=len(data))


@dataclass
class RunFiles:
    """The artifacts of a run as files, and the spec that names them."""

    root: Path
    spec: RunSpec
    manifest: Manifest
    corpus: CorpusManifest
    weights: Path
    weights_digest: str
    blocks: list[Path] = field(default_factory=list)

    @property
    def open_paths(self) -> tuple[Path, Path, Path]:
        return self.root / "config.json", self.root / "manifest.json", self.root / "corpus.json"

    @property
    def open_request(self) -> dict[str, Any]:
        config, manifest, corpus = self.open_paths
        return {
            "spec": self.spec.model_dump(mode="json"),
            "model_config_path": str(config),
            "manifest_path": str(manifest),
            "corpus_path": str(corpus),
        }

    def task(
        self,
        blocks: range,
        *,
        version: int = 0,
        digest: str | None = None,
        round_number: int = 1,
        tokens_before: int = 0,
    ) -> tuple[RoundTask, list[Path]]:
        """A task for some blocks, and their files."""
        refs = tuple(BlockRef(epoch=0, block=block) for block in blocks)
        tokens = len(refs) * BLOCK_TOKENS
        weights_digest = digest or self.weights_digest
        lease = Lease(
            lease_id=lease_id(self.spec.run_id, round_number, 0, NODE, refs),
            run_id=self.spec.run_id,
            round=round_number,
            attempt=0,
            node_id=NODE,
            blocks=refs,
            tokens=tokens,
        )
        task = RoundTask(
            run_id=self.spec.run_id,
            generation=0,
            round=round_number,
            lease=lease,
            base=VersionRef(
                version=version,
                weights_digest=weights_digest,
                checkpoint_version=version,
                checkpoint=ArtifactRef(digest=weights_digest, size_bytes=1),
                updates_from=version,
                updates=(),
            ),
            tokens_before=tokens_before,
            tokens_round=tokens,
            issued_unix=0.0,
            deadline_unix=0.0,
            expires_unix=0.0,
            poll_seconds=0.0,
        )
        return task, [self.blocks[block] for block in blocks]


def _make_run(root: Path, inner: InnerSpec, uplink: CodecSpec, downlink: CodecSpec) -> RunFiles:
    root.mkdir(parents=True)
    config = preset("nano")
    model = build_model(config, seed=7, device="cpu")
    manifest = manifest_of(named_trainable(model))
    parameters = dict(named_trainable(model))

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join((stdlib / name).read_bytes() for name in ("argparse.py", "typing.py"))
    count = len(text) // BLOCK_TOKENS
    tokens = np.frombuffer(text, np.uint8)[: count * BLOCK_TOKENS].astype("<u2")
    tokens = tokens.reshape(count, BLOCK_TOKENS)
    blocks = []
    for number, block in enumerate(tokens):
        path = root / f"block-{number}.bin"
        path.write_bytes(block.tobytes())
        blocks.append(path)
    corpus = CorpusManifest(
        tokenizer=TokenizerSpec(kind="bytes", vocab_size=260, eos_id=257, digest=None),
        dtype="uint16",
        block_tokens=BLOCK_TOKENS,
        block_count=count,
        tokens=count * BLOCK_TOKENS,
        heldout_tokens=1,
        dropped_tokens=0,
        total_tokens=count * BLOCK_TOKENS + 1,
        documents=1,
        heldout_documents=1,
        heldout_digest=_sha(b""),
        blocks_index=ArtifactRef(digest=_sha(b""), size_bytes=32 * count),
        sources=("stdlib",),
    )
    artifacts = {
        "config.json": config_bytes(config),
        "manifest.json": manifest.to_bytes(),
        "corpus.json": canonical_bytes(corpus),
    }
    for name, data in artifacts.items():
        (root / name).write_bytes(data)
    digest = save_weights(
        root / "weights.safetensors", manifest, lambda name: parameters[name].detach()
    )
    spec = RunSpec(
        run_id="test-run",
        model=_ref(artifacts["config.json"]),
        manifest=_ref(artifacts["manifest.json"]),
        corpus=_ref(artifacts["corpus.json"]),
        parameters=manifest.parameters,
        sequence_length=SEQUENCE,
        micro_batch=4,
        inner=inner,
        uplink=uplink,
        downlink=downlink,
        feedback_start=0.5,
    )
    return RunFiles(root, spec, manifest, corpus, root / "weights.safetensors", digest, blocks)


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., RunFiles]]:
    """Build a run in ``tmp_path / "run"``; one CPU thread for the test that uses it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(
        inner: InnerSpec | None = None,
        uplink: CodecSpec | None = None,
        downlink: CodecSpec | None = None,
    ) -> RunFiles:
        return _make_run(
            tmp_path / "run",
            inner or InnerSpec(),
            uplink or CodecSpec(chunk=256, keep=8),
            downlink or CodecSpec(chunk=256, keep=8),
        )

    yield make
    torch.set_num_threads(threads)
