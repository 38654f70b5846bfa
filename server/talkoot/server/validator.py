"""The validator: the coordinator's own look at contributions, at the lowest priority.

Two looks. *gain*: the contribution alone, applied to the version that it was trained from, must
lower the loss on text (the idea of Gauntlet, arXiv 2505.21684, section 3: on assigned and on other
blocks). *replay*: a lease with fresh state is trained again and the payloads are compared.

It holds no state: what was asked and is not done is in the ledger. torch comes with the first look.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import select

from talkoot.protocol.blocks import block_order
from talkoot.protocol.corpus import INDEX, block_digest
from talkoot.protocol.errors import TalkootError
from talkoot.protocol.messages import Contribution, RoundTask, Signed, parse
from talkoot.server.belief import Belief, Outcome
from talkoot.server.book import task_of
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger.schema import ContributionRecord, LeaseRecord, Version

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 1.0
NICENESS: Final = 19
SEQUENCES: Final = 32
"""That a gain is measured on, of either kind."""
SIGMAS: Final = 3.0
"""A gain counts as one, or as harm, beyond this many standard errors."""
SAME_COSINE: Final = 0.9
"""Replays on this machine give the same bytes; another thread count or device changes the last
bits, and with them some of the coordinates that are chosen."""


class Validator:
    """Looks at what was asked for, one after the other."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._belief = Belief(coordinator)

    def run(self, stop: threading.Event) -> None:
        """Look until ``stop`` is set."""
        os.nice(NICENESS)
        while not stop.is_set():
            try:
                busy = self.step()
            except TalkootError as err:
                log.warning("a validation failed: %s", err.sentence)
                busy = False
            if not busy:
                stop.wait(IDLE_SECONDS)

    def step(self) -> bool:
        """One look; False when there is nothing to look at."""
        wanted = self._belief.next_validation()
        if wanted is None:
            return False
        lease_id, kind = wanted
        try:
            outcome = self._gain(lease_id) if kind == "gain" else self._replay(lease_id)
        except (FileNotFoundError, TalkootError) as err:
            # The round went on meanwhile, and what is needed was collected.
            log.info("%s of lease %s is dropped: %s", kind, lease_id, err)
            outcome = None
        self._belief.validated(lease_id, kind, outcome, now=time.time())
        return True

    # What it needs --------------------------------------------------------------------------------

    def _facts(self, lease_id: str) -> tuple[RoundTask, int, Path, Path]:
        """The task, the claimed steps, the payload and the published weights of the base."""
        with self._c.ledger.read() as session:
            task = task_of(session.get_one(LeaseRecord, lease_id))
            contribution = session.get_one(ContributionRecord, lease_id)
            payload = contribution.payload_digest
            claim = parse(Signed, contribution.signed.encode("ascii"))
            steps = parse(Contribution, claim.body.encode("ascii")).steps
            base = session.scalars(
                select(Version.directory).where(
                    Version.run_id == self._c.run_id, Version.version == task.base.version
                )
            ).one()
        from talkoot.server.aggregate import VersionDir

        return (
            task,
            steps,
            self._c.store.path(payload),
            VersionDir(self._c.state.versions / base).published,
        )

    def _block(self, number: int) -> bytes:
        index = (self._c.state.corpus / INDEX).read_bytes()
        found = self._c.source.lookup(block_digest(index, number))
        if found is None:
            raise FileNotFoundError(f"block {number}")
        with found.path.open("rb") as file:
            file.seek(found.offset)
            return file.read(found.length)

    def _rows(self, blocks: Sequence[int], seed: int) -> Tensor:
        """(at most SEQUENCES, sequence_length) int64 of these blocks."""
        import torch

        from talkoot.protocol.corpus import load_block

        length = self._c.spec.sequence_length
        rows: list[Any] = []
        for block in blocks[:SEQUENCES]:
            rows += list(load_block(self._block(block), self._c.corpus).reshape(-1, length))
        picked = block_order(seed, 0, len(rows))[:SEQUENCES].tolist()
        return torch.stack([torch.from_numpy(rows[i].astype("int64")) for i in picked])

    # Gain -----------------------------------------------------------------------------------------

    def _gain(self, lease_id: str) -> Outcome:
        import torch

        from talkoot.protocol.adapters import model_of
        from talkoot.protocol.model import named_trainable, parse_config
        from talkoot.protocol.payload import PayloadReader
        from talkoot.protocol.weights import WeightsReader

        task, _, payload, base = self._facts(lease_id)
        spec, manifest = self._c.spec, self._c.manifest
        mine = [ref.block for ref in task.lease.blocks]
        seed = int(self._belief.chance("blocks", lease_id) * 2**32)
        order = block_order(seed, 0, self._c.corpus.block_count).tolist()
        others = [block for block in order if block not in set(mine)] or mine
        rows = [self._rows(mine, seed), self._rows(others, seed)]
        config = parse_config(self._c.store.path(spec.model.digest).read_bytes())
        model = model_of(config, spec.adapter, self._c.base, device="cpu").eval()
        weights = WeightsReader(base, manifest)
        update = PayloadReader(payload, manifest, spec.uplink)
        losses: list[list[Tensor]] = []
        for applied in (False, True):
            with torch.no_grad():
                for name, parameter in named_trainable(model):
                    dense = weights.get(name).float().clone()
                    if applied:
                        update.decode(name).add_to_(dense.view(-1), alpha=-1.0)
                    parameter.copy_(dense)
            losses.append([_losses(model, part) for part in rows])
        gains = [before - after for before, after in zip(*losses, strict=True)]
        means = [float(gain.mean()) for gain in gains]
        errors = [float(gain.std() / max(len(gain), 2) ** 0.5) or 1e-9 for gain in gains]
        figures = {
            "gain_assigned": means[0],
            "gain_random": means[1],
            "error_assigned": errors[0],
            "error_random": errors[1],
        }
        told = f"alone it changes the loss by {-means[0]:+.4f} on its own blocks and by "
        told += f"{-means[1]:+.4f} on others"
        if means[0] < -SIGMAS * errors[0] and means[1] < -SIGMAS * errors[1]:
            return Outcome("gain-missing", f"It does harm: {told}.", figures)
        if means[1] > SIGMAS * errors[1]:
            return Outcome("gain-good", f"It helps: {told}.", figures)
        return Outcome("gain-unclear", f"It can't be told: {told}.", figures)

    # Replay ---------------------------------------------------------------------------------------

    def _replay(self, lease_id: str) -> Outcome:
        from talkoot.protocol import recipes
        from talkoot.protocol.model import parse_config
        from talkoot.protocol.replay import ReplayJob, replay_lease

        task, steps, payload, base = self._facts(lease_id)
        spec = self._c.spec
        with tempfile.TemporaryDirectory(dir=self._c.state.incoming) as scratch:
            blocks = []
            for number, ref in enumerate(task.lease.blocks):
                blocks.append(Path(scratch) / f"block-{number}")
                blocks[-1].write_bytes(self._block(ref.block))
            again = Path(scratch) / "payload"
            replay_lease(
                ReplayJob(
                    config=parse_config(self._c.store.path(spec.model.digest).read_bytes()),
                    spec=spec,
                    manifest=self._c.manifest,
                    corpus=self._c.corpus,
                    task=task,
                    base=base,
                    blocks=blocks,
                    recipe=recipes.reference(spec.adapter is not None),
                    steps=steps,
                    frozen=self._c.base,
                ),
                again,
            )
            cosine = payload_cosine(self._c, payload, again)
        figures = {"cosine": cosine}
        if cosine >= SAME_COSINE:
            return Outcome("replay-same", f"Trained again, it is the same ({cosine:.4f}).", figures)
        return Outcome(
            "replay-differs",
            f"Trained again, it is another ({cosine:.4f}, and {SAME_COSINE} is asked for).",
            figures,
        )


def _losses(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """(sequences,) mean cross-entropy of each row."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), rows[:, 1:], reduction="none"
        )
    mean: Tensor = losses.mean(dim=1)
    return mean


def payload_cosine(coordinator: Coordinator, a: Path, b: Path) -> float:
    """Cosine of two decoded payloads, tensor by tensor."""
    from talkoot.protocol.payload import PayloadReader

    manifest, codec = coordinator.manifest, coordinator.spec.uplink
    one, two = (PayloadReader(path, manifest, codec) for path in (a, b))
    inner = first = second = 0.0
    for tensor in manifest.tensors:
        x = one.decode(tensor.name).to_dense(tensor.numel).double()
        y = two.decode(tensor.name).to_dense(tensor.numel).double()
        inner, first, second = (
            inner + float(x @ y),
            first + float(x @ x),
            second + float(y @ y),
        )
    return float(inner / max(math.sqrt(first * second), 1e-300))
