"""A run with ``inner.max_steps`` through the real desk and validator, under two kinds of recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sqlalchemy import select

from talkoot.protocol.errors import RefusedError
from talkoot.server.config import parse_config
from talkoot.server.ledger.schema import ValidationRecord
from talkoot.server.setup import init
from talkoot.server.validator import Validator
from talkoot.sims.desk_node import DeskNode
from talkoot.sims.in_process import InProcessCoordinator

STEPS = {"fp32-adamw": 5, "fp32-backward-adamw": 8}
"""Of a lease of eight batches."""


def test_each_recipe_makes_the_steps_it_can_is_accepted_and_replays_to_the_same(
    tmp_path: Path, config_text: Callable[..., str]
) -> None:
    torch.set_num_threads(1)
    inner = "[inner]\nmax_steps = 5\nrate_power = 0.5\nclip_norm = 0.0\n"
    text = config_text(tokens=2048, more="[belief]\nreplay_share = 1.0\nwait_seconds = 3600\n")
    init(tmp_path / "state", parse_config(text.replace("[inner]\n", inner)), say=lambda _: None)
    with InProcessCoordinator(tmp_path / "state", tmp_path / "operator") as network:
        nodes = {name: DeskNode(network, tmp_path / name, name, name) for name in STEPS}
        assert {name: node.work()["steps"] for name, node in nodes.items()} == STEPS
        validator = Validator(network.coordinator)
        while validator.step():
            pass
        with network.coordinator.ledger.read() as session:
            asked = select(ValidationRecord).where(ValidationRecord.kind == "replay")
            found = {row.code: json.loads(row.figures)["cosine"] for row in session.scalars(asked)}
        assert set(found) == {"replay-same"}
        assert min(found.values()) > 0.999

        node = nodes["fp32-adamw"]
        train = node.trainer.train
        node.trainer.train = lambda *args: {**train(*args), "steps": 4}  # type: ignore[method-assign]
        with pytest.raises(RefusedError, match="claims 4 steps where its lease has 5"):
            node.work()
