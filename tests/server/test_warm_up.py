"""Version 0, trained by the coordinator before there is a network."""

from __future__ import annotations

import sysconfig
from contextlib import closing
from pathlib import Path

import pytest
import torch

from talkoot.protocol.corpus import load_heldout, read_manifest
from talkoot.protocol.errors import CapacityError, ConfigError, TalkootError
from talkoot.protocol.model import build_model, named_trainable, preset
from talkoot.protocol.replica import Replica
from talkoot.protocol.weights import WeightsReader
from talkoot.server.aggregate import VersionDir
from talkoot.server.config import Config, parse_config
from talkoot.server.coordinator import Coordinator
from talkoot.server.heldout import heldout_loss, heldout_rows
from talkoot.server.setup import init

TEXT = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"


def config(warm_up: str) -> Config:
    return parse_config(
        f"""
        warm_up = {{ {warm_up} }}
        [model]
        preset = "nano"
        sequence_length = 32
        micro_batch = 4
        [corpus]
        sources = ["{TEXT}"]
        block_tokens = 128
        heldout_fraction = 0.1
        [round]
        tokens_per_node = 1024
        [inner]
        learning_rate = 4e-3
        warmup_tokens = 50_000
        total_tokens = 1_000_000
        """
    )


def loss_and_start(root: Path) -> tuple[float, int]:
    """Held-out loss of version 0, and where the run's schedule begins."""
    with closing(Coordinator.open(root)) as coordinator:
        state = coordinator.state
        reader = WeightsReader(
            VersionDir(state.versions / "v00000000").published, coordinator.manifest
        )
        model = build_model(preset("nano"), seed=None, device="cpu")
        with torch.no_grad():
            for name, parameter in named_trainable(model):
                parameter.copy_(reader.get(name))
        corpus = read_manifest(state.corpus)
        rows = heldout_rows(load_heldout(state.corpus, corpus), 32, 2048)
        return heldout_loss(model, rows), coordinator.spec.inner.start_tokens


def test_a_warmed_up_version_0_has_learned_and_the_schedule_goes_on_from_there(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    init(tmp_path / "cold", config("tokens = 0"), say=said.append)
    assert not any("warm-up" in line for line in said)
    init(tmp_path / "warm", config("tokens = 5000"), say=said.append)
    assert any("warm-up: 5,120 tokens, 40 steps" in line for line in said)  # whole blocks
    cold, start = loss_and_start(tmp_path / "cold")
    assert start == 0
    warm, start = loss_and_start(tmp_path / "warm")
    assert start == 50_000
    assert warm < cold - 1.0


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ('tokens = 1000, recipe = "fp31"', "no recipe named 'fp31'"),
        ('tokens = 1000, device = "cuda:9"', "warm_up.device: 'cuda:9'"),
        ('tokens = 1000, device = "toaster"', "warm_up.device: 'toaster'"),
    ],
)
def test_what_cannot_be_had_is_said_and_nothing_is_left(
    tmp_path: Path, section: str, said: str
) -> None:
    root = tmp_path / "state"
    with pytest.raises(TalkootError) as caught:
        init(root, config(section), say=lambda _: None)
    assert said in caught.value.sentence
    assert not root.exists()


def test_adapters_are_not_warmed_up() -> None:
    with pytest.raises(ConfigError, match="need no warm-up"):
        parse_config('warm_up.tokens = 1\n[model]\npretrained = "x"\n[adapter]\nrank = 4\n')


def test_a_device_that_is_too_small_is_told_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_replica: Replica, _ids: torch.Tensor, _rate: float) -> float:
        raise torch.OutOfMemoryError  # as an accelerator has it; a processor's memory never says so

    monkeypatch.setattr(Replica, "step", full)
    with pytest.raises(CapacityError, match=r"choose another warm_up\.recipe"):
        init(tmp_path / "state", config("tokens = 1000"), say=lambda _: None)
    assert not (tmp_path / "state").exists()
