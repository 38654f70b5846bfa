"""The two measures: one node alone, and all nodes as one synchronous data-parallel job.

Both see the very leases that a network of equal nodes gets in the same world, sequence by sequence,
and the same schedule. ``one`` trains on node 0's leases; ``ddp`` joins the n-th batches of all
nodes into one batch. Neither has rounds in any other sense: nothing is averaged or compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import torch

from talkoot.client.trainer.tensors import load_tensors, save_tensors
from talkoot.protocol.files import write_atomic
from talkoot.protocol.leases import CommittedBlocks, Member, plan_leases
from talkoot.protocol.messages import Count, Lease, Message, canonical_bytes, parse
from talkoot.protocol.recipes import get
from talkoot.protocol.replica import build_replica
from talkoot.protocol.schedule import learning_rate, lease_position
from talkoot.protocol.sequences import Sequences
from talkoot.server.heldout import heldout_loss
from talkoot.sims.lab.world import World

Kind = Literal["one", "ddp"]
RECIPE: Final = "fp32-adamw"


class BaselineState(Message):
    """``baseline.json``: how far a saved baseline is."""

    format: Literal[1] = 1
    round: Count
    steps: Count


class Baseline:
    """One of the two measures, a round at a time. :meth:`save` lets it go on later from there."""

    def __init__(self, world: World, nodes: int, kind: Kind, root: Path) -> None:
        self.world = world
        self._nodes = nodes
        self._kind = kind
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        self._replica = build_replica(world.blank_model(), get(RECIPE), world.config.inner)
        self._committed = CommittedBlocks(world.shards[0].manifest.block_count)
        self.round = 0
        self.tokens = 0
        path = root / "baseline.json"
        if not path.is_file():
            self._replica.load_weights(world.initial.__getitem__)
            return
        state = parse(BaselineState, path.read_bytes())
        load_tensors(self._file(state.round, "weights"), self._replica.weights())
        load_tensors(self._file(state.round, "moments"), self._replica.state())
        self._replica.steps = state.steps
        while self.round < state.round:  # the plan is a pure function: repeat it
            self._take(self._leases())

    def run_round(self) -> float:
        """A step of each batch that a node of the network trains in a round; the mean loss."""
        leases = self._leases()
        spec = self.world.spec()
        chosen = leases[:1] if self._kind == "one" else leases
        data = [self._sequences(lease) for lease in chosen]
        tokens_round = sum(lease.tokens for lease in leases)
        losses = []
        for step in range(data[0].steps.batches):
            done = data[0].tokens_after(step + 1)
            position = lease_position(self.tokens, tokens_round, done, data[0].tokens)
            batch = torch.cat([sequences.batch(step) for sequences in data])
            losses.append(self._replica.step(batch, learning_rate(spec.inner, position)))
        self._take(leases)
        return sum(losses) / len(losses)

    def heldout_loss(self) -> float:
        """Of the weights as they are now."""
        return heldout_loss(self._replica.model, self.world.heldout)

    def save(self) -> None:
        """Write weights and optimizer state; the pointer changes last."""
        before = set(self._root.glob("*.safetensors"))
        save_tensors(self._file(self.round, "weights"), self._replica.weights())
        save_tensors(self._file(self.round, "moments"), self._replica.state())
        state = BaselineState(round=self.round, steps=self._replica.steps)
        write_atomic(self._root / "baseline.json", canonical_bytes(state))
        for path in before - {self._file(self.round, "weights"), self._file(self.round, "moments")}:
            path.unlink()

    def _file(self, round_number: int, what: str) -> Path:
        return self._root / f"{what}-{round_number:06d}.safetensors"

    def _leases(self) -> Sequence[Lease]:
        """The next round's, of a network of equal nodes that are all there."""
        config = self.world.config
        return plan_leases(
            seed=config.run.seed,
            run_id=self.world.spec().run_id,
            round=self.round + 1,
            attempt=0,
            block_tokens=self.world.shards[0].manifest.block_tokens,
            committed=self._committed,
            members=[Member(f"{i:016x}", config.round.tokens_per_node) for i in range(self._nodes)],
        )

    def _take(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self._committed.add(lease.blocks)
            self.tokens += lease.tokens
        self.round += 1

    def _sequences(self, lease: Lease) -> Sequences:
        shard = self.world.shards[0]
        blocks = [shard.block(ref.block).tobytes() for ref in lease.blocks]
        return Sequences(self.world.spec(), shard.manifest, lease, blocks)
