"""An adapter run from end to end, in one process: real coordinator, trainers, data plane, export.

What is trained beside the base is all that travels; the base is fetched once, by its digest.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from talkoot.client.home import Home
from talkoot.client.trainer.core import Trainer
from talkoot.client.trainer_host import TrainerHost
from talkoot.client.worker import Worker
from talkoot.protocol import recipes
from talkoot.protocol.adapters import model_of
from talkoot.protocol.errors import ConfigError, IntegrityError, StateError
from talkoot.protocol.messages import InnerSpec
from talkoot.protocol.model import named_trainable, preset
from talkoot.protocol.replica import new_replica
from talkoot.protocol.weights import WeightsReader
from talkoot.server.aggregate import VersionDir
from talkoot.server.config import parse_config
from talkoot.server.evaluator import Evaluator
from talkoot.server.export import export_version
from talkoot.server.setup import init
from talkoot.sims.desk_node import DeskNode
from talkoot.sims.in_process import InProcessCoordinator

RANK = 8


def pretrained(root: Path, text: bytes) -> Path:
    """A nano model that has read a little, as a transformers directory."""
    config = {**preset("nano"), "tie_word_embeddings": True}
    replica = new_replica(config, recipes.get("fp32-adamw"), InnerSpec(), seed=1, device="cpu")
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    for step in range(40):
        ids = rows[step * 512 : (step + 1) * 512].view(8, 64)
        replica.step(ids, 4e-3)
    replica.model.save_pretrained(root)  # type: ignore[operator]
    return root


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adapters")
    text = root / "text"
    text.mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("ast", "inspect", "typing"):
        shutil.copy(stdlib / f"{name}.py", text)
    base = pretrained(root / "base", (stdlib / "argparse.py").read_bytes())
    config = parse_config(f"""
[model]
pretrained = "{base}"
sequence_length = 64
micro_batch = 4

[adapter]
rank = {RANK}
base_dtype = "float32"

[corpus]
sources = ["{text}"]
block_tokens = 512
heldout_fraction = 0.3

[inner]
learning_rate = 8e-3

[round]
tokens_per_node = 8192
checkpoint_every = 2

[uplink]
keep = 512
[downlink]
keep = 1024

[network]
bind = "127.0.0.1"
""")
    init(root / "state", config, say=lambda _: None)
    yield root / "state"
    torch.set_num_threads(threads)


def heldout(network: InProcessCoordinator, evaluator: Evaluator) -> float:
    """Loss of the newest version on held-out text."""
    assert evaluator.step()
    from talkoot.server.status import evaluation_of

    with network.coordinator.ledger.read() as session:
        found = evaluation_of(session, network.coordinator.run_id, network.version)
    assert found is not None
    return float(found["loss"])


def test_nodes_with_three_recipes_train_adapters_and_the_merged_export_is_what_was_trained(
    state: Path, tmp_path: Path
) -> None:
    names = ["lora-fp32", "lora-fp32-ckpt"]
    try:
        import bitsandbytes  # noqa: F401

        names.append("qlora-nf4-fp32")
    except ImportError:
        pass
    with InProcessCoordinator(state, tmp_path / "operator") as network:
        coordinator = network.coordinator
        spec, adapter = coordinator.spec, coordinator.spec.adapter
        assert adapter is not None
        assert spec.parameters * 5 < spec.model_parameters
        assert {t.name.rpartition(".")[2] for t in coordinator.manifest.tensors} == {
            "lora_A",
            "lora_B",
        }
        assert adapter.base.digest in network.book.served_digests(2)
        evaluator = Evaluator(coordinator)
        losses = [heldout(network, evaluator)]
        nodes = [DeskNode(network, tmp_path / name, name, name) for name in names]
        sizes = []
        for number in range(3):
            sizes += [node.work()["size"] for node in nodes]
            if number == 2:  # whoever publishes a version may open the next round at once
                late = DeskNode(network, tmp_path / "late", "late", "lora-fp32")
            network.publish()
            losses.append(heldout(network, evaluator))
        assert losses[-1] < losses[0] - 0.1
        assert max(sizes) < adapter.base.size_bytes / 4

        # A node that comes later starts from a checkpoint of adapters alone.
        assert late.work()["tokens"] > 0

        merged, alone = tmp_path / "merged", tmp_path / "alone"
        version = export_version(coordinator, merged, 3, merge=True)
        export_version(coordinator, alone, 3)
        config = json.loads(coordinator.store.path(spec.model.digest).read_bytes())
        model = model_of(config, adapter, coordinator.base, device="cpu").eval()
        weights = WeightsReader(
            VersionDir(coordinator.state.versions / version.directory).published,
            coordinator.manifest,
        )
        with torch.no_grad():
            for name, parameter in named_trainable(model):
                parameter.copy_(weights.get(name))
        same_logits(model, merged, alone, state.parent / "base")


def same_logits(model: torch.nn.Module, merged: Path, alone: Path, base: Path) -> None:
    """Base with adapters, the merged model in plain transformers, and PEFT's reading agree."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(60)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        assert not torch.allclose(bare(input_ids=ids).logits, wanted, atol=1e-2)
        peft = pytest.importorskip("peft")
        read = peft.PeftModel.from_pretrained(bare, alone).eval()
        torch.testing.assert_close(read(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_worker_proves_itself_fetches_the_base_once_and_resumes_after_its_trainer_was_killed(
    state: Path, tmp_path: Path
) -> None:
    with InProcessCoordinator(state, tmp_path / "operator") as network:
        home = Home(tmp_path / "node")
        enrolment = network.enrol(home, "ada", admitted=False)
        with TrainerHost(home.work, "cpu", 1, home.logs / "t.log", checkpoint_seconds=0.0) as host:
            worker = Worker(home, host)
            worker.prepare()
            adapter = worker.spec.adapter
            assert adapter is not None
            file = home.store / adapter.base.digest[:2] / adapter.base.digest[2:]
            assert file.exists()
            born = file.stat().st_mtime_ns
            assert worker.prove().accepted
            task = network.lease(enrolment.node_id)
            killed: list[dict[str, Any]] = []

            def kill_once(report: dict[str, Any]) -> None:
                if report.get("step", 0) >= 3 and not killed:
                    killed.append(report)
                    host.kill()

            worker._progress = kill_once  # type: ignore[method-assign]
            assert worker.execute(task).accepted
            assert killed
            assert file.stat().st_mtime_ns == born
            worker.close()


def test_what_cannot_be_an_adapter_run_is_refused_with_a_sentence(
    state: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank is set and model\.pretrained is not"):
        parse_config('[model]\npreset = "nano"\n[adapter]\nrank = 4\n')
    with InProcessCoordinator(state, tmp_path / "operator") as network:
        coordinator = network.coordinator
        spec, path = coordinator.spec, coordinator.store.path
        config, manifest, corpus = (
            path(ref.digest) for ref in (spec.model, spec.manifest, spec.corpus)
        )
        wrong = tmp_path / "wrong"
        assert coordinator.base is not None
        wrong.write_bytes(coordinator.base.read_bytes()[:-1] + b"x")
        with pytest.raises(IntegrityError, match="not the file that the run names"):
            Trainer(tmp_path / "work", "cpu").open(spec, config, manifest, corpus, wrong)
        with pytest.raises(ConfigError, match="for an adapter run"):
            Trainer(tmp_path / "work", "cpu", recipe="fp32-adamw").open(
                spec, config, manifest, corpus
            )
        trainer = Trainer(tmp_path / "work", "cpu")
        trainer.open(spec, config, manifest, corpus)
        with pytest.raises(StateError, match="opened without its base weights"):
            trainer._built()


def test_a_run_that_trains_the_whole_model_has_nothing_to_merge(tmp_path: Path) -> None:
    from talkoot.sims.in_process import nano_state

    with (
        InProcessCoordinator(nano_state(tmp_path), tmp_path / "operator") as network,
        pytest.raises(ConfigError, match="nothing to merge: leave out --merge"),
    ):
        export_version(network.coordinator, tmp_path / "out", None, merge=True)
