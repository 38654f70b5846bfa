"""When memory runs out a node falls to a smaller recipe, keeps its work and never loops."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import RunFiles
from typer.testing import CliRunner

from talkoot.client.caps import Caps
from talkoot.client.home import Home
from talkoot.client.trainer.core import Trainer
from talkoot.client.trainer.falls import MAX_FALLS, is_out_of_memory, ladder, next_after
from talkoot.client.trainer_host import TrainerHost
from talkoot.client.worker import Worker
from talkoot.protocol.errors import CapacityError, UnavailableError
from talkoot.protocol.model import preset
from talkoot.protocol.recipes import get, needs_less, recipes_of
from talkoot.protocol.replica import Replica
from talkoot.server.cli import app
from talkoot.server.config import parse_config
from talkoot.server.ledger.schema import Event
from talkoot.server.proofs import memory_of
from talkoot.server.setup import init
from talkoot.sims.in_process import InProcessCoordinator

MakeRun = Callable[..., RunFiles]
Step = Callable[..., float]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("adapters", [False, True])
def test_every_way_down_ends_and_each_step_needs_less(device: str, adapters: bool) -> None:
    for name in recipes_of(adapters):
        now, path = get(name), [name]
        choice = ladder([name], device, adapters=adapters)
        for _ in range(MAX_FALLS):
            try:
                after = next_after(choice, now, len(path) - 1, device)
            except CapacityError:
                break
            assert needs_less(after, now, device)
            assert not needs_less(now, after, device)
            now = after
            path.append(now.name)
        with pytest.raises(CapacityError, match="there is no smaller recipe to go on with") as last:
            next_after(choice, now, MAX_FALLS, device)
        assert last.value.code == "out-of-memory"
        assert len(set(path)) == len(path)


def test_what_a_node_falls_to_is_what_it_was_told_fits() -> None:
    choice = ladder(["fp32-adamw", "bf16-adamw", "fp32-backward-adafactor"], "cpu", adapters=False)
    assert next_after(choice, choice[0], 0, "cpu").name == "bf16-adamw"
    with pytest.raises(CapacityError):
        next_after(choice, choice[2], 1, "cpu")


def test_errors_that_say_that_memory_ran_out_are_told_from_others() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def fails_at(steps: set[int], during: str) -> Step:
    """A step of a real replica that runs out of memory in its n-th calls, in a phase."""
    real, calls = Replica.step, [0]

    def step(self: Replica, ids: torch.Tensor, rate: float) -> float:
        calls[0] += 1
        if calls[0] not in steps:
            return real(self, ids, rate)
        heard = self.on_phase

        def phase(name: str) -> None:
            heard(name)
            if name == during:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

        self.on_phase = phase
        return real(self, ids, rate)

    return step


@pytest.mark.parametrize("during", ["forward", "backward", "update"])
def test_the_steps_that_were_done_are_kept_and_the_rest_is_done_by_the_next_recipe(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    run = make_run()
    task, blocks = run.task(range(3))
    whole = Trainer(tmp_path / "whole", "cpu", checkpoint_seconds=0)
    whole.open(run.spec, *run.open_paths)
    whole.sync(0, run.weights_digest, (0, run.weights), [])
    wanted = whole.train(task, blocks)

    # A long time between checkpoints: only what is saved at the fall itself can be kept.
    trainer = Trainer(tmp_path / "work", "cpu", checkpoint_seconds=3600)
    trainer.open(run.spec, *run.open_paths)
    trainer.sync(0, run.weights_digest, (0, run.weights), [])
    monkeypatch.setattr(Replica, "step", fails_at({4}, during))
    reports: list[dict[str, Any]] = []
    result = trainer.train(task, blocks, on_progress=reports.append)
    assert [r["fell"] for r in reports if "fell" in r] == [
        {"before": "fp32-adamw", "after": "fp32-adamw-ckpt"}
    ]
    fall = trainer._opened.work.state.falls[0]
    # In the update the weights may be half changed, and what is not certain is not kept.
    assert fall.step == (0 if during == "update" else 3)
    assert fall.lease_id == task.lease.lease_id
    assert (result["steps"], result["tokens"]) == (wanted["steps"], wanted["tokens"])
    assert result["loss"] == pytest.approx(wanted["loss"], rel=1e-4)

    # It stays there when it starts again, until it is given another recipe to begin with.
    again = Trainer(tmp_path / "work", "cpu")
    assert again.open(run.spec, *run.open_paths)["recipe"] == "fp32-adamw-ckpt"
    other = Trainer(tmp_path / "work", "cpu", recipe="fp32-backward-adamw")
    said = other.open(run.spec, *run.open_paths)
    assert (said["recipe"], said["falls"]) == ("fp32-backward-adamw", 0)


def test_a_fall_in_the_backward_pass_of_a_recipe_that_updates_there_goes_back_to_the_checkpoint(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    task, blocks = run.task(range(3))
    trainer = Trainer(tmp_path, "cpu", recipe="fp32-backward-adamw", checkpoint_seconds=0)
    trainer.open(run.spec, *run.open_paths)
    trainer.sync(0, run.weights_digest, (0, run.weights), [])
    monkeypatch.setattr(Replica, "step", fails_at({3}, "backward"))
    steps: list[int] = []
    trainer.train(task, blocks, on_progress=lambda r: steps.append(r.get("step", 0)))
    assert trainer.state()["recipe"] == "fp32-backward-adafactor"
    assert trainer._opened.work.state.falls[0].step == 2


def test_a_node_that_fits_nowhere_stops_after_a_few_falls_with_one_sentence_and_keeps_its_work(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    task, blocks = run.task(range(3))
    trainer = Trainer(tmp_path, "cpu", checkpoint_seconds=0)
    trainer.open(run.spec, *run.open_paths)
    trainer.sync(0, run.weights_digest, (0, run.weights), [])
    monkeypatch.setattr(Replica, "step", fails_at(set(range(3, 1000)), "forward"))
    for _ in range(2):  # asked again, it doesn't begin anew
        with pytest.raises(CapacityError, match=f"after {MAX_FALLS} smaller recipes") as raised:
            trainer.train(task, blocks)
        assert raised.value.code == "out-of-memory"
    assert len(trainer._opened.work.state.falls) == MAX_FALLS
    assert trainer.state()["lease"]["step"] == 2
    with pytest.raises(CapacityError):
        trainer.prove("0" * 32)


def state_of_a_larger_model(root: Path) -> Path:
    """Activations of some hundred MB, so that a cap can fall between two recipes."""
    text = root / "text"
    text.mkdir(parents=True)
    (text / "a.txt").write_text("the cat sat on the mat and looked at the moon. " * 4000)
    (text / "b.txt").write_text("a dog ran over the hill and barked at the stars. " * 4000)
    (root / "model.json").write_text(json.dumps({**preset("nano"), "num_hidden_layers": 8}))
    settings = parse_config(f"""
[model]
config = "{root / "model.json"}"
sequence_length = 128
micro_batch = 16
[corpus]
sources = ["{text}"]
block_tokens = 2048
heldout_fraction = 0.5
[round]
tokens_per_node = 6144
[admission]
memory_margin = 1.0
check_proof_up_to_parameters = 0
[network]
bind = "127.0.0.1"
""")
    init(root / "state", settings, say=lambda _: None)
    return root / "state"


def data_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def test_under_a_cap_that_the_kernel_enforces_a_node_falls_in_a_lease_delivers_and_proves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    # Freed tensors then go back to the kernel at once, and the next step must ask it again.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    state = state_of_a_larger_model(tmp_path)
    said: list[str] = []
    with InProcessCoordinator(state, tmp_path / "operator") as network:
        home = Home(tmp_path / "node")
        node = network.enrol(home, "ada", admitted=False).node_id
        with TrainerHost(home.work, "cpu", 1, home.logs / "t.log", checkpoint_seconds=0.0) as host:
            worker = Worker(home, host, said.append)
            worker.prepare()
            assert worker.prove().accepted
            assert host.pid is not None
            empty = data_bytes(host.pid)
            assert worker.counters.proved_recipe == "fp32-adamw"
            real = worker._progress

            def squeeze(report: dict[str, Any]) -> None:
                real(report)
                if report.get("step") == 1 and worker.falls == 0:
                    assert host.pid is not None
                    # Weights, moments, gradients and a layer's activations fit; all layers' don't.
                    cap = empty + 60 * 2**20
                    _, hard = resource.prlimit(host.pid, resource.RLIMIT_DATA)
                    resource.prlimit(host.pid, resource.RLIMIT_DATA, (cap, hard))

            worker._progress = squeeze  # type: ignore[method-assign]
            pid = host.pid
            assert worker.execute(network.lease(node)).accepted
            assert host.pid == pid  # it was never restarted
            assert worker.falls >= 1
            assert worker.recipe != "fp32-adamw"
            assert worker.counters.proved_recipe == worker.recipe
            worker.report()
            worker.close()
        assert any(line.startswith("Memory ran out under fp32-adamw;") for line in said)
        shown = memory_of(network.coordinator, node)
        assert (shown["recipe"], shown["falls"]) == (worker.recipe, worker.falls)
        assert [p["recipe"] for p in shown["proofs"]] == [worker.recipe, "fp32-adamw"]
        assert all(p["accepted"] for p in shown["proofs"])
        with network.coordinator.ledger.read() as session:
            events = session.query(Event).filter_by(kind="fell").all()
            assert [e.sentence for e in events] == [
                f"ada ({node}): memory ran out; it goes on with {worker.recipe}."
            ]
        done = CliRunner().invoke(
            app, ["nodes", "show", node, "--state", str(tmp_path / "operator")]
        )
        assert f"recipe {worker.recipe}, after memory ran out" in done.output
        assert shown["capability"]["device"] == "cpu"
        assert f"machine cpu {shown['capability']['device_name'][:20]}" in done.output


def test_a_cap_given_to_the_trainer_holds_from_the_start(tmp_path: Path) -> None:
    with (
        TrainerHost(tmp_path / "work", "cpu", 1, tmp_path / "log", caps=Caps(ram=2**20)) as host,
        pytest.raises(UnavailableError, match="trainer process ended"),
    ):
        host.call("state")
    assert "raise --max-ram" in (tmp_path / "log").read_text()
