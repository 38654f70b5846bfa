"""What a report of a run says, as plain data. The names of the fields are the keys of report.json.

Units: ``*_seconds`` and ``seconds`` seconds, ``bytes_*`` and ``*_bytes`` bytes, ``tokens`` tokens,
losses mean cross-entropy in nats per token. ``None`` is "not known".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class _Row:
    """A row that can be taken out of a coordinator's status, which holds more."""

    @classmethod
    def from_status(cls, row: Mapping[str, Any]) -> Self:
        """Take what this row has from ``row``; what is missing there is ``None`` or its default."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in row.items() if key in known})


@dataclass(frozen=True)
class RoundRow(_Row):
    """One published round."""

    round: int
    version: int | None = None
    loss: float | None = None
    """Mean training loss over the contributions."""
    tokens: int = 0
    """Tokens that this round committed."""
    contributions: int = 0
    bytes_up: int = 0
    """All contributions of the round."""
    update_bytes: int | None = None
    """The published update, which each node fetches."""
    seconds: float | None = None
    """From the round's opening to its publication."""
    training_seconds: float | None = None
    """Of the node that trained longest."""


@dataclass(frozen=True)
class NodeRow(_Row):
    """One node at the end of the run."""

    node_id: str
    name: str = ""
    status: str | None = None
    contributions: int = 0
    tokens_per_second: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    version: int | None = None
    weights_digest: str | None = None
    restarts: int | None = None
    healed: int | None = None


@dataclass(frozen=True)
class Kill:
    """A process that was killed on purpose, and how long the network needed to be whole again."""

    what: str
    when_seconds: float
    """Since the start of the run, on the clock of :attr:`ReportData.first_round_seconds`."""
    recovery_seconds: float | None
    """``None``: it did not come back before the end."""


@dataclass(frozen=True)
class ReportData:
    """All that :func:`talkoot.sims.report.write_report` needs."""

    run_id: str
    model: str
    parameters: int
    rounds: int
    """Rounds that were published."""
    nodes: int
    heldout_loss_before: float
    """On text that no node trained on, with the weights of version 0."""
    heldout_loss_after: float
    """On the same text, with the weights of the last version."""
    bits_per_parameter_up: float
    """A contribution's bytes on the wire."""
    bits_per_parameter_down: float
    """A published update's bytes on the wire."""
    nontraining_seconds_per_round: float
    """Median over the rounds of what is left of a round when training is taken off."""
    replicas_agree: bool
    """Every replica has the weights digest that the ledger has."""
    wall_seconds: float
    export_dir: str
    """A Hugging Face model directory."""
    history: tuple[RoundRow, ...]
    node_rows: tuple[NodeRow, ...]
    kills: tuple[Kill, ...] = ()
    first_round_seconds: float = 0.0
    """When the first round opened, on the clock of :attr:`Kill.when_seconds`."""
    sample_prompt: str = ""
    sample_text: str = ""
    """What the exported model wrote after the prompt."""
    software: Mapping[str, str] = field(default_factory=dict)
    """Versions by name."""

    @property
    def tokens(self) -> int:
        """Tokens that all rounds committed together."""
        return sum(row.tokens for row in self.history)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the fields' names, and ``tokens``.

        JSON has no infinity and no not-a-number: they become ``None``, so that the report of a run
        that diverged can still be read.
        """
        plain: dict[str, Any] = _finite(asdict(self) | {"tokens": self.tokens})
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
