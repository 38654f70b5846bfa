"""Models that are not plain: mixtures of experts, tied embeddings, shared heads, sliding windows.

From an operator's config.json to an export that transformers loads, in one process: real
coordinator, trainers of two recipes, codec, aggregation and evaluation.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from talkoot.protocol.model import preset
from talkoot.protocol.weights import WeightsReader
from talkoot.server.aggregate import VersionDir
from talkoot.server.config import parse_config
from talkoot.server.evaluator import Evaluator
from talkoot.server.export import export_version
from talkoot.server.setup import init
from talkoot.server.status import evaluation_of
from talkoot.sims.desk_node import DeskNode
from talkoot.sims.in_process import InProcessCoordinator

ROUNDS = 3
RECIPES = ("fp32-adamw", "bf16-backward-adamw8")
LENGTH = 64
MODELS: dict[str, dict[str, Any]] = {
    "mixture of experts, tied": {
        **{"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2},
        **{"intermediate_size": 64, "router_aux_loss_coef": 0.01, "output_router_logits": True},
        "tie_word_embeddings": True,
    },
    "sliding window, shared heads": {
        **{"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 1},
    },
    "tied, shared heads, biases": {
        **{"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
}


def _state(root: Path, change: dict[str, Any]) -> Path:
    text = root / "text"
    text.mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "inspect", "typing"):
        shutil.copy(stdlib / f"{name}.py", text)
    (root / "config.json").write_text(json.dumps({**preset("nano"), **change}))
    config = parse_config(f"""
[model]
config = "{root / "config.json"}"
sequence_length = {LENGTH}
micro_batch = 4

[corpus]
sources = ["{text}"]
block_tokens = 512
heldout_fraction = 0.2

[inner]
learning_rate = 4e-3

[round]
tokens_per_node = 8192
""")
    init(root / "state", config, say=lambda _: None)
    return root / "state"


def _heldout(network: InProcessCoordinator, evaluator: Evaluator) -> float:
    assert evaluator.step()
    with network.coordinator.ledger.read() as session:
        found = evaluation_of(session, network.coordinator.run_id, network.version)
    assert found is not None
    return float(found["loss"])


@pytest.mark.parametrize("what", MODELS)
def test_other_models_are_trained_by_two_recipes_and_exported(what: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = {**preset("nano"), **MODELS[what]}
    with InProcessCoordinator(_state(tmp_path, MODELS[what]), tmp_path / "operator") as network:
        evaluator = Evaluator(network.coordinator)
        losses = [_heldout(network, evaluator)]
        nodes = [DeskNode(network, tmp_path / name, name, name) for name in RECIPES]
        for _ in range(ROUNDS):
            digests = {node.id: node.work()["digest"] for node in nodes}
            assert len(set(digests.values())) == len(nodes)
            network.publish()
            losses.append(_heldout(network, evaluator))
        assert losses[-1] < losses[0] - 0.3

        version = export_version(network.coordinator, tmp_path / "export", ROUNDS)
        manifest = network.coordinator.manifest
        published = VersionDir(network.coordinator.state.versions / version.directory).published
        weights = WeightsReader(published, manifest)
        wanted = {tensor.name: weights.get(tensor.name).float() for tensor in manifest.tensors}
        _is_exported(tmp_path / "export", config, wanted, losses[0])


def _is_exported(
    directory: Path, config: dict[str, Any], wanted: dict[str, torch.Tensor], untrained: float
) -> None:
    """Plain transformers loads it, finds the published weights, and has learnt to predict."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert model.config.model_type == config["model_type"]
    for key in ("num_experts", "sliding_window", "num_key_value_heads", "tie_word_embeddings"):
        if key in config:
            assert getattr(model.config, key) == config[key]
    parameters = dict(model.named_parameters())
    assert wanted.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, wanted[name]), name
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    text = torch.frombuffer(bytearray((stdlib / "textwrap.py").read_bytes()), dtype=torch.uint8)
    ids = text[: 32 * LENGTH].long().view(32, LENGTH)
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < untrained - 0.3
