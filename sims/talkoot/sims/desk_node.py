"""A node without a daemon, a wire or processes of its own, for tests and trials of recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from talkoot.client.home import Home
from talkoot.client.trainer.core import Trainer
from talkoot.protocol.corpus import INDEX, block_digest
from talkoot.protocol.errors import RefusedError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.messages import ArtifactRef, Contribution, Signed, canonical_bytes
from talkoot.sims.in_process import InProcessCoordinator, lease_of, task_of


class DeskNode:
    """A trainer in this process that talks to the coordinator's desk without a wire.

    Args:
        network: where it is admitted.
        root: its files.
        name: its own.
        recipe: how it holds its replica.
    """

    def __init__(self, network: InProcessCoordinator, root: Path, name: str, recipe: str) -> None:
        self._network = network
        self.id = network.enrol(Home(root), name).node_id
        self.key = NodeKey.load(Home(root).key)
        self.trainer = Trainer(root / "work", "cpu", recipe=recipe, checkpoint_seconds=0.0)
        self._root = root
        coordinator = network.coordinator
        spec, path = coordinator.spec, coordinator.store.path
        self.trainer.open(
            spec,
            path(spec.model.digest),
            path(spec.manifest.digest),
            path(spec.corpus.digest),
            coordinator.base,
        )

    def work(self) -> dict[str, Any]:
        """One lease from end to end, and what the trainer says of it.

        Raises :class:`RefusedError` when the contribution is not accepted.
        """
        signed = self._network.lease(self.id)
        task, coordinator = task_of(signed), self._network.coordinator
        path = coordinator.store.path
        ref = task.base
        held = self.trainer.state()["version"]
        fresh = held is None
        start = ref.checkpoint_version if fresh else held
        self.trainer.sync(
            ref.version,
            ref.weights_digest,
            (start, path(ref.checkpoint.digest)) if fresh else None,
            [path(u.digest) for u in ref.updates[start - ref.updates_from :]],
        )
        result = self.trainer.train(task, self._blocks(signed))
        lease_id = task.lease.lease_id
        payload = self._root / "payload"
        shutil.copy(result["payload_path"], payload)
        desk = self._network.desk
        desk.pushed(self.id, lease_id, result["digest"], payload)
        claim = Contribution(
            run_id=task.run_id,
            round=task.round,
            lease_id=lease_id,
            node_id=self.id,
            base_weights_digest=ref.weights_digest,
            payload=ArtifactRef(digest=result["digest"], size_bytes=result["size"]),
            tokens=result["tokens"],
            steps=result["steps"],
            loss=result["loss"],
            training_seconds=result["training_seconds"],
        )
        verdict = desk.submit(self.id, self.key.sign("Contribution", canonical_bytes(claim)))
        if not verdict.accepted:
            raise RefusedError(verdict.sentence, code=verdict.code)
        self.trainer.settle(lease_id, True)
        return result

    def _blocks(self, signed: Signed) -> list[Path]:
        coordinator = self._network.coordinator
        index = (coordinator.state.corpus / INDEX).read_bytes()
        files = []
        for ref in lease_of(signed).blocks:
            found = coordinator.source.lookup(block_digest(index, ref.block))
            if found is None:
                raise RefusedError(f"Block {ref.block} is not there.", code="not-found")
            with found.path.open("rb") as file:
                file.seek(found.offset)
                files.append(self._root / f"block-{ref.block}")
                files[-1].write_bytes(file.read(found.length))
        return files
