"""Held-out loss: which rows of the held-out text are looked at, and the mean loss on them.

A torch module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talkoot.protocol.corpus import HELDOUT_SOURCES, CorpusManifest, Tokens, load_heldout
from talkoot.protocol.errors import CorpusError

ROWS_AT_ONCE = 32
"""Sequences in a forward pass: the logits are what needs memory."""


def heldout_rows(tokens: Tokens, sequence_length: int, most_tokens: int) -> Tensor:
    """(sequences, sequence_length) int64: at most ``most_tokens`` tokens, spread evenly.

    The same arguments give the same rows, so losses of different versions can be compared.

    Raises:
        CorpusError: the held-out text is shorter than one sequence.
    """
    starts = _spread(np.arange(_whole(tokens, sequence_length)), most_tokens // sequence_length)
    return _cut(tokens, starts, sequence_length)


@dataclass(frozen=True)
class SourceRows:
    """What is looked at of one source."""

    source: str
    rows: Tensor
    """(sequences, sequence_length) int64."""
    weight: float
    """The source's share of the held-out text."""


def rows_by_source(
    directory: Path, manifest: CorpusManifest, sequence_length: int, most_tokens: int
) -> list[SourceRows]:
    """Rows of each source that has held-out text, in equal numbers, so that none goes unseen.

    A row belongs to the source of its middle token. A corpus from before sources were kept counts
    as one source.

    Raises:
        CorpusError: the held-out text is shorter than one sequence, or is damaged.
    """
    tokens = load_heldout(directory, manifest)
    whole = _whole(tokens, sequence_length)
    owner = np.zeros(whole, dtype=np.int64)
    path = directory / HELDOUT_SOURCES
    names: Sequence[str] = manifest.sources
    if path.is_file():
        table = np.fromfile(path, dtype="<u8").reshape(-1, 2).astype(np.int64)
        ends = np.cumsum(table[:, 1])
        if not len(table) or int(ends[-1]) != len(tokens) or table[:, 0].max() >= len(names):
            raise CorpusError(f"{path} does not belong to its corpus: build the corpus again.")
        middles = np.arange(whole) * sequence_length + sequence_length // 2
        owner = table[np.searchsorted(ends, middles, side="right"), 0]
    elif len(names) > 1:
        names = (" + ".join(names)[:200],)
    present = np.unique(owner).tolist()
    each = max(1, most_tokens // sequence_length // len(present))
    made = []
    for source in present:
        places = np.flatnonzero(owner == source)
        rows = _cut(tokens, _spread(places, each), sequence_length)
        made.append(SourceRows(names[source], rows, len(places) / whole))
    return made


def mean_loss(losses: Sequence[float], weights: Sequence[float]) -> float:
    """The loss on the whole held-out text from those of its sources."""
    return math.fsum(loss * w for loss, w in zip(losses, weights, strict=True)) / sum(weights)


@torch.inference_mode()
def heldout_loss(model: torch.nn.Module, rows: Tensor) -> float:
    """Mean cross-entropy of a causal LM on ``rows``, nats per token; its mode is kept."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE].to(device)
        answer: Any = model(input_ids=batch, labels=batch, use_cache=False)
        total += float(answer.loss) * len(batch)
    model.train(training)
    return total / len(rows)


def _whole(tokens: Tokens, sequence_length: int) -> int:
    whole = len(tokens) // sequence_length
    if whole == 0:
        raise CorpusError(
            f"The held-out text has {len(tokens)} tokens, less than one sequence of "
            f"{sequence_length}: raise corpus.heldout_fraction."
        )
    return whole


def _spread(places: np.typing.NDArray[np.int64], wanted: int) -> list[int]:
    count = max(1, min(len(places), wanted))
    return [int(places[i * len(places) // count]) for i in range(count)]


def _cut(tokens: Tokens, places: Sequence[int], length: int) -> Tensor:
    rows = torch.empty((len(places), length), dtype=torch.int64)
    for i, place in enumerate(places):
        rows[i] = torch.from_numpy(tokens[place * length : (place + 1) * length].astype("int64"))
    return rows
