"""A worker's trainer on a simulated device: the real operations, in this process.

The device's speed is the scenario's: what a lease would have taken there is what the contribution
says. Liars lie here, with the lab's means (``talkoot.sims.attacks``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from talkoot.client.trainer.core import Trainer
from talkoot.protocol.artifacts import sha256_file
from talkoot.protocol.corpus import load_block
from talkoot.protocol.errors import StateError
from talkoot.protocol.manifest import Manifest
from talkoot.protocol.messages import RoundTask, RunSpec, parse
from talkoot.protocol.steps import steps_of
from talkoot.server.coordinator import Coordinator
from talkoot.sims.attacks.kinds import Actor, liars
from talkoot.sims.in_process import CAPABILITY
from talkoot.sims.lab.behaviour import Situation
from talkoot.sims.lab.tamper import tampered
from talkoot.sims.virtual.layout import Layout, Profile

FORGED_LOSS = 3.0
"""What a node claims that has not trained: who looks at the status page knows as much."""


@dataclass
class Device:
    """What one process has in memory and lends to each of its nodes in turn."""

    trainer: Trainer | None = None
    spec: RunSpec | None = None
    newest: tuple[int, str, Path] | None = None
    """Version, weights digest and file that a node made last in this process: the next one's
    would have the same bytes."""


class VirtualTrainer:
    """``TrainerHost`` without the child process. One node's, for one message.

    Args:
        layout: of the run.
        home: of the node.
        profile: of the node.
        device: this process's, by recipe.
    """

    def __init__(self, layout: Layout, home: Path, profile: Profile, device: Device) -> None:
        self._layout = layout
        self._work = home / "work"
        self._home = home
        self._profile = profile
        self._device = device
        self._manifest: Manifest | None = None
        self._corpus: Path | None = None

    def call(
        self,
        op: str,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Run one operation and return its result; raises what the operation raises."""
        if op == "open":
            return self._open(arguments)
        if op == "measure":  # its device is the scenario's, and so is the recipe that it opens with
            return CAPABILITY.model_dump(mode="json")
        trainer = self._trainer
        if op == "state":
            return trainer.state()
        if op == "sync":
            return self._sync(arguments)
        if op == "train":
            task = _message(RoundTask, arguments["task"])
            result = self._train(task, [Path(path) for path in arguments["blocks"]])
            self._layout.note_steps(task.round, result.get("training_seconds", 0.0))
            speed = self._profile.speed_in(task.round)
            return {**result, "training_seconds": result["tokens"] / speed}
        if op == "settle":
            return trainer.settle(arguments["lease_id"], arguments["accepted"])
        raise StateError(f"A simulated trainer has no operation {op!r}.", code="unknown-op")

    def _sync(self, given: dict[str, Any]) -> dict[str, Any]:
        version, digest = given["target"]["version"], given["target"]["weights_digest"]
        trainer, device = self._trainer, self._device
        newest = device.newest
        if newest is not None and newest[:2] == (version, digest) and trainer.adopt(*newest):
            return {"version": version, "weights_digest": digest}
        base = given["checkpoint"]
        done = trainer.sync(
            version,
            digest,
            (base["version"], Path(base["path"])) if base is not None else None,
            [Path(path) for path in given["updates"]],
        )
        device.newest = trainer.published
        return done

    @property
    def _trainer(self) -> Trainer:
        if self._device.trainer is None:
            raise StateError("The trainer has no run yet: open one first.", code="not-open")
        return self._device.trainer

    def _open(self, given: dict[str, Any]) -> dict[str, Any]:
        spec = _message(RunSpec, given["spec"])
        device = self._device
        if device.trainer is not None and device.spec == spec:
            device.trainer.move(self._work)
        else:
            # A lease is short, and can be done again: no checkpoint but the last.
            device.trainer = Trainer(
                self._work, "cpu", recipe=self._profile.recipe, checkpoint_seconds=math.inf
            )
            device.trainer.open(
                spec,
                Path(given["model_config_path"]),
                Path(given["manifest_path"]),
                Path(given["corpus_path"]),
            )
            device.spec = spec
        self._corpus = Path(given["corpus_path"])
        self._manifest = Manifest.from_bytes(Path(given["manifest_path"]).read_bytes())
        return {"parameters": spec.parameters, "recipe": self._profile.recipe, "falls": 0}

    def _train(self, task: RoundTask, blocks: Sequence[Path]) -> dict[str, Any]:
        profile = self._profile
        if profile.attack is None or task.round < profile.attack_from:
            return self._trainer.train(task, blocks)
        (actor,) = liars(profile.attack, 1, profile.attack_from)
        situation = Situation(task.round, profile.index, profile.seed, self._honest(task.round))
        assert self._manifest is not None
        forged = self._forge(actor, situation, task)
        if forged is not None:
            return forged
        changed = self._changed(actor, situation, blocks)
        with tampered(self._manifest, actor.behaviour, situation):
            return self._trainer.train(task, changed)

    def _honest(self, number: int) -> tuple[Path, ...]:
        """Payloads of this round's honest nodes, who have all worked before any liar does."""
        return tuple(sorted(self._layout.outbox(number).glob("*.honest")))

    def _forge(self, actor: Actor, situation: Situation, task: RoundTask) -> dict[str, Any] | None:
        spec = self._device.spec
        assert spec is not None
        known = cast(Coordinator, SimpleNamespace(manifest=self._manifest, spec=spec))
        path = self._home / "forged.safetensors"
        if not actor.forge(known, situation, path):
            return None
        digest, size = sha256_file(path)
        return {
            "payload_path": str(path),
            "digest": digest,
            "size": size,
            "tokens": task.lease.tokens,
            "steps": steps_of(spec, task.lease.tokens).fewest,
            "loss": FORGED_LOSS,
        }

    def _changed(self, actor: Actor, situation: Situation, blocks: Sequence[Path]) -> list[Path]:
        """The blocks as the liar sees them."""
        from talkoot.protocol.corpus import parse_manifest

        assert self._corpus is not None
        corpus = parse_manifest(self._corpus.read_bytes())
        directory = self._home / "changed"
        directory.mkdir(exist_ok=True)
        paths = []
        for number, block in enumerate(blocks):
            ids = actor.behaviour.tokens(situation, load_block(block.read_bytes(), corpus).copy())
            paths.append(directory / str(number))
            paths[-1].write_bytes(np.asarray(ids).astype(f"<u{corpus.item_bytes}").tobytes())
        return paths


def _message(kind: type[Any], data: object) -> Any:
    return parse(kind, json.dumps(data).encode("ascii"))
