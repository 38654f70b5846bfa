"""What network is struck, as an operator would configure it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """What network it is."""

    nodes: int = 3
    tokens_per_node: int = 8192
    block_tokens: int = 512
    quorum: int = 1
    min_nodes: int = 1
    deadline_seconds: float = 20.0
    lost_after_seconds: float = 6.0
    ledger_url: str = ""
    """Empty: SQLite in the state directory."""


def config_toml(shape: Shape, text: Path) -> str:
    """The operator's configuration."""
    return f"""
[run]
name = "chaos"
rounds = 1000000

[model]
preset = "nano"
sequence_length = 64
micro_batch = 4

[corpus]
sources = ["{text}"]
block_tokens = {shape.block_tokens}
heldout_fraction = 0.05

[inner]
learning_rate = 4e-3

[outer]
optimizer = "nesterov"
learning_rate = 0.7
momentum = 0.9

[round]
tokens_per_node = {shape.tokens_per_node}
deadline_seconds = {shape.deadline_seconds}
lost_after_seconds = {shape.lost_after_seconds}
quorum = {shape.quorum}
min_nodes = {shape.min_nodes}
checkpoint_every = 4

[network]
bind = "127.0.0.1"
gateway_port = 0
transfer_port = 0

[ledger]
url = "{shape.ledger_url}"
"""
