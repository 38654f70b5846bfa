"""Measures published versions on held-out text: a part of its own, at the lowest priority.

It never stands in a round's way: it reads the newest published weights, and a version that it
cannot reach in time is passed over. What it finds goes into the ledger. It may die at any time.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from sqlalchemy import select

from talkoot.protocol.errors import StateError, TalkootError
from talkoot.server.book import Book
from talkoot.server.coordinator import Coordinator, note
from talkoot.server.ledger.schema import Evaluation, Version

if TYPE_CHECKING:
    import torch

    from talkoot.server.heldout import SourceRows

log = logging.getLogger(__name__)

LOOP_SECONDS = 0.5
"""How often the evaluator looks for a new version."""
MEMORY_MARGIN = 0.8
"""Share of the available host memory that a model on the CPU may take."""
LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Due:
    """The version to measure next."""

    version: int
    weights_digest: str
    directory: str


def due(coordinator: Coordinator) -> Due | None:
    """The newest version, if it is one that is to be measured and has not been."""
    every = coordinator.config.evaluation.every
    with coordinator.ledger.read() as session:
        newest: Version = Book(coordinator).latest_version(session)
        number = newest.version
        if every == 0 or (number % every and number < coordinator.rounds_total):
            return None
        done = session.scalars(
            select(Evaluation.version).where(
                Evaluation.run_id == coordinator.run_id, Evaluation.version == number
            )
        ).first()
        if done is not None:
            return None
        return Due(number, newest.weights_digest, newest.directory)


def bytes_needed(parameters: int, item_bytes: int) -> int:
    """Host memory of a model with its logits, roughly: weights and a tenth of them."""
    return parameters * item_bytes * 11 // 10


class Evaluator:
    """Measures one version after the other.

    Args:
        coordinator: open state.
        available_bytes: of host memory.
        clock: Unix seconds.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        available_bytes: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._c = coordinator
        self._available = available_bytes
        self._clock = clock
        self._model: torch.nn.Module | None = None
        self._rows: list[SourceRows] = []
        self._told: set[str] = set()

    def run(self, stop: threading.Event) -> None:
        """Until ``stop`` is set. What cannot be measured is told once, and the rest goes on."""
        while not stop.wait(LOOP_SECONDS):
            try:
                self.step()
            except TalkootError as err:
                if err.sentence not in self._told:
                    self._told.add(err.sentence)
                    log.warning(err.sentence)
                    with self._c.ledger.write() as session:
                        note(session, "evaluation", err.sentence)

    def step(self) -> bool:
        """Measure the version that is due; False when none is, or when it was gone already.

        Raises:
            TalkootError: there is no memory for the model, or the held-out text is damaged.
        """
        wanted = due(self._c)
        if wanted is None:
            return False
        # A second name keeps the file when the conductor deletes the version's directory.
        source = self._c.state.versions / wanted.directory / "published.safetensors"
        kept = self._c.state.run / "evaluated.safetensors"
        try:
            kept.parent.mkdir(exist_ok=True)
            kept.unlink(missing_ok=True)
            os.link(source, kept)
        except FileNotFoundError:
            return False  # newer versions are out
        try:
            found = self._measure(kept, wanted)
        finally:
            kept.unlink(missing_ok=True)
        now = self._clock()
        with self._c.ledger.write() as session:
            session.add_all(
                Evaluation(
                    run_id=self._c.run_id,
                    version=wanted.version,
                    source=source.source[:256],
                    loss=loss,
                    tokens=source.rows.numel(),
                    weight=source.weight,
                    unix=now,
                )
                for source, loss in found
            )
        return True

    def _measure(self, path: Path, wanted: Due) -> list[tuple[SourceRows, float]]:
        import torch

        from talkoot.protocol.model import named_trainable
        from talkoot.protocol.weights import WeightsReader
        from talkoot.server.heldout import heldout_loss, rows_by_source

        config, spec = self._c.config, self._c.spec
        if not self._rows:
            self._rows = rows_by_source(
                self._c.state.corpus,
                self._c.corpus,
                spec.sequence_length,
                config.evaluation.tokens,
            )
        model = self._built()
        reader = WeightsReader(path, self._c.manifest)
        with torch.no_grad():
            for name, parameter in named_trainable(model):
                parameter.copy_(reader.get(name))
        found = [(source, heldout_loss(model, source.rows)) for source in self._rows]
        log.info(
            "version %d: held-out loss %s",
            wanted.version,
            ", ".join(f"{loss:.4f} ({source.source})" for source, loss in found),
        )
        return found

    def _built(self) -> torch.nn.Module:
        """The model, in fp32 if that fits, else in bf16."""
        if self._model is not None:
            return self._model
        import torch

        from talkoot.protocol.adapters import model_of
        from talkoot.protocol.model import parse_config

        device = self._c.config.evaluation.device
        room = int(self._available() * MEMORY_MARGIN)
        parameters = self._c.spec.model_parameters
        dtype = torch.float32
        if device == "cpu" and bytes_needed(parameters, 4) > room:
            dtype = torch.bfloat16
            if bytes_needed(parameters, 2) > room:
                raise StateError(
                    f"Held-out loss is not measured: {parameters:,} parameters need "
                    f"{bytes_needed(parameters, 2) / 1e9:.1f} GB of memory and {room / 1e9:.1f} GB "
                    "are there; set evaluation.device to an accelerator, or evaluation.every to 0.",
                    code="no-memory",
                )
        data = self._c.store.path(self._c.spec.model.digest).read_bytes()
        model = model_of(
            parse_config(data), self._c.spec.adapter, self._c.base, device=device, dtype=dtype
        )
        self._model = model.eval()
        return self._model
