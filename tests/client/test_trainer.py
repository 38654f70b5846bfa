from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from talkoot.client.trainer.core import Trainer
from talkoot.client.trainer_host import TrainerHost
from talkoot.protocol import recipes
from talkoot.protocol.artifacts import sha256_file
from talkoot.protocol.errors import (
    IntegrityError,
    ProtocolError,
    StateError,
    TalkootError,
    UnavailableError,
)
from talkoot.protocol.messages import CodecSpec, InnerSpec, RoundTask
from talkoot.protocol.payload import PayloadReader
from talkoot.protocol.proof import proof_result
from talkoot.protocol.replay import ReplayJob, replay_lease
from talkoot.protocol.schedule import feedback_share
from talkoot.protocol.weights import WeightsReader, apply_update

if TYPE_CHECKING:
    from .conftest import RunFiles
else:
    RunFiles = Any

MakeRun = Callable[..., RunFiles]
NONCE = "00112233445566778899aabbccddeeff"


def opened(run: RunFiles, root: Path, *, checkpoint_seconds: float = 1e9) -> Trainer:
    trainer = Trainer(root, "cpu", checkpoint_seconds=checkpoint_seconds)
    trainer.open(run.spec, *run.open_paths)
    return trainer


def synced(run: RunFiles, root: Path, *, checkpoint_seconds: float = 1e9) -> Trainer:
    trainer = opened(run, root, checkpoint_seconds=checkpoint_seconds)
    trainer.sync(0, run.weights_digest, (0, run.weights), [])
    return trainer


def train_request(run: RunFiles, blocks: range) -> dict[str, Any]:
    task, paths = run.task(blocks)
    return {"task": task.model_dump(mode="json"), "blocks": [str(path) for path in paths]}


def feedback_of(trainer: Trainer, run: RunFiles) -> dict[str, torch.Tensor]:
    work = trainer._opened.work
    assert work.state.feedback is not None
    reader = WeightsReader(work.path(work.state.feedback), run.manifest)
    return {name: reader.get(name) for name in reader.names()}


def replay_of(
    trainer: Trainer, run: RunFiles, task: RoundTask, blocks: Any, recipe: str, steps: int
) -> ReplayJob:
    """What the coordinator repeats a lease with, given a trainer of the same run."""
    return ReplayJob(
        config=dict(trainer._opened.config),
        spec=run.spec,
        manifest=run.manifest,
        corpus=run.corpus,
        task=task,
        base=run.weights,
        blocks=blocks,
        recipe=recipes.get(recipe),
        steps=steps,
    )


def test_training_on_real_text_lowers_the_loss(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    trainer = synced(run, tmp_path / "work")
    reports: list[dict[str, Any]] = []
    task, blocks = run.task(range(40))
    result = trainer.train(task, blocks, on_progress=reports.append)
    assert reports[0]["step"] == 1
    assert reports[-1]["step"] == result["steps"] == 40 * 512 // (4 * 64)
    assert reports[0]["loss"] > 5.0
    assert reports[-1]["loss"] < 4.0
    assert result["tokens"] == task.lease.tokens
    assert reports[-1]["loss"] < result["loss"] < reports[0]["loss"]


def test_a_replica_that_was_adopted_trains_as_one_that_was_synced(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    first, second = synced(run, tmp_path / "first"), opened(run, tmp_path / "second")
    assert first.published is not None
    assert second.adopt(*first.published)
    assert second.published is not None
    assert second.published[2].samefile(first.published[2])
    task, blocks = run.task(range(2))
    assert second.train(task, blocks)["digest"] == first.train(task, blocks)["digest"]


def test_a_file_that_is_gone_is_not_adopted(make_run: MakeRun, tmp_path: Path) -> None:
    trainer = opened(make_run(), tmp_path / "work")
    assert not trainer.adopt(0, "0" * 64, tmp_path / "gone")
    assert trainer.state()["version"] is None


def test_a_partial_last_batch_is_trained_on_too(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    spec = run.spec.model_copy(update={"micro_batch": 3})
    trainer = Trainer(tmp_path / "work", "cpu")
    trainer.open(spec, *run.open_paths)
    trainer.sync(0, run.weights_digest, (0, run.weights), [])
    task, blocks = run.task(range(2))
    result = trainer.train(task, blocks)
    assert result["steps"] == math.ceil(2 * 512 / 64 / 3)
    assert result["tokens"] == 1024


def test_a_lease_that_was_stopped_anywhere_ends_with_the_same_payload(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    whole = synced(run, tmp_path / "whole")
    broken = synced(run, tmp_path / "broken")
    for number, first in ((1, 0), (2, 4)):  # the second lease starts from kept moments
        task, blocks = run.task(range(first, first + 4), round_number=number)
        expected = whole.train(task, blocks)
        for _ in range(3):
            with pytest.raises(UnavailableError) as stopped:
                broken.train(task, blocks, should_stop=_after(2))
            assert stopped.value.code == "stopped"
            broken = opened(run, tmp_path / "broken")  # as after a restart
        assert broken.state()["lease"]["step"] == 6
        result = broken.train(task, blocks)
        assert result["digest"] == expected["digest"]
        assert result["loss"] == expected["loss"]
        for trainer in (whole, broken):
            trainer.settle(task.lease.lease_id, accepted=True)


def with_steps(run: RunFiles, most: int) -> RunFiles:
    inner = run.spec.inner.model_copy(update={"max_steps": most})
    return replace(run, spec=run.spec.model_copy(update={"inner": inner}))


def test_a_long_lease_takes_larger_steps_and_one_stopped_within_a_step_ends_with_the_same_bits(
    make_run: MakeRun, tmp_path: Path
) -> None:
    plain_run = make_run()
    run = with_steps(plain_run, 5)
    task, blocks = run.task(range(4))  # 8 batches: steps of 1, 2, 1, 2 and 2
    plain = synced(plain_run, tmp_path / "plain").train(task, blocks)
    whole = synced(run, tmp_path / "whole")
    reports: list[dict[str, Any]] = []
    expected = whole.train(task, blocks, on_progress=reports.append)
    assert (plain["steps"], expected["steps"]) == (8, 5)
    assert expected["tokens"] == plain["tokens"] == 4 * 512
    assert expected["digest"] != plain["digest"]
    assert (reports[-1]["step"], {r["steps"] for r in reports}) == (5, {5})
    assert whole._opened.work.state.moments.steps == 5  # type: ignore[union-attr]

    done = []
    for asked in (2, 4):  # in the midst of the second step, and of the fourth
        broken = opened(run, tmp_path / "broken")
        if asked == 2:
            broken.sync(0, run.weights_digest, (0, run.weights), [])
        with pytest.raises(UnavailableError, match="stopped after step"):
            broken.train(task, blocks, should_stop=_after(asked))
        checkpoint = broken._opened.work.checkpoint
        assert checkpoint is not None
        done.append((checkpoint.step, checkpoint.batch, checkpoint.steps, checkpoint.batches))
    assert done == [(1, 1, 5, 8), (3, 4, 5, 8)]
    result = opened(run, tmp_path / "broken").train(task, blocks)
    assert (result["digest"], result["loss"]) == (expected["digest"], expected["loss"])


@pytest.mark.parametrize("fell_after", [None, 0, 2])
def test_a_replay_makes_the_steps_that_the_node_s_recipes_made(
    make_run: MakeRun, tmp_path: Path, fell_after: int | None
) -> None:
    # Without clipping these two are the same to the bit, but for which batches make a step.
    run = with_steps(make_run(InnerSpec(clip_norm=0, rate_power=0.5)), 3)
    task, blocks = run.task(range(4))
    task = task.model_copy(update={"fresh_state": True})
    first = Trainer(tmp_path / "work", "cpu", recipe="fp32-adamw-ckpt")
    first.open(run.spec, *run.open_paths)
    first.sync(0, run.weights_digest, (0, run.weights), [])
    if fell_after is None:
        sent = first.train(task, blocks)
        assert sent["steps"] == 3  # of 2, 3 and 3 batches
    else:
        asked = {0: 0, 2: 5}[fell_after]
        with pytest.raises(UnavailableError, match=f"after step {fell_after} of 3"):
            first.train(task, blocks, should_stop=_after(asked))
        second = Trainer(tmp_path / "work", "cpu", recipe="fp32-backward-adamw")
        second.open(run.spec, *run.open_paths)
        sent = second.train(task, blocks)
        assert sent["steps"] == {0: 8, 2: 2 + 3}[fell_after]
    job = replay_of(first, run, task, blocks, "fp32-adamw-ckpt", sent["steps"])
    replayed = tmp_path / "replay.safetensors"
    assert replay_lease(job, replayed) == pytest.approx(sent["loss"], abs=1e-9)
    assert sha256_file(replayed)[0] == sent["digest"]


def test_a_lease_of_few_batches_is_as_if_there_were_no_most_steps(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    task, blocks = run.task(range(2))
    one, two = synced(run, tmp_path / "one"), synced(with_steps(run, 4), tmp_path / "two")
    assert one.train(task, blocks)["digest"] == two.train(task, blocks)["digest"]


def test_a_proof_where_steps_may_be_of_several_batches_is_made_of_such(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    joined = with_steps(run, 4)
    plain = opened(run, tmp_path / "one").prove(NONCE)
    proof = opened(joined, tmp_path / "two").prove(NONCE)
    assert proof["predicted_bytes"] > plain["predicted_bytes"]
    assert proof["sketch"] != plain["sketch"]
    loss, sketch = proof_result(
        opened(joined, tmp_path / "three")._opened.config,
        NONCE,
        sequence_length=run.spec.sequence_length,
        micro_batch=run.spec.micro_batch,
        inner=joined.spec.inner,
    )
    assert loss == pytest.approx(proof["loss"])
    assert sketch == proof["sketch"]


def _after(calls: int) -> Callable[[], bool]:
    """A ``should_stop`` that says yes once it has been asked ``calls`` times."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def test_a_trainer_killed_with_sigkill_resumes_to_the_same_payload(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    task, blocks = run.task(range(30))
    expected = synced(run, tmp_path / "whole").train(task, blocks)
    request = train_request(run, range(30))
    with TrainerHost(
        tmp_path / "killed", "cpu", 1, tmp_path / "log", checkpoint_seconds=0.0
    ) as host:
        host.call("open", **run.open_request)
        host.call(
            "sync",
            target={"version": 0, "weights_digest": run.weights_digest},
            checkpoint={"version": 0, "path": str(run.weights)},
            updates=[],
        )

        def kill(report: dict[str, Any]) -> None:
            host.kill()

        with pytest.raises(UnavailableError) as died:
            host.call("train", on_progress=kill, **request)
        assert died.value.code == "trainer-died"
        lease = host.call("state")["lease"]  # a new child, opened again
        assert 1 <= lease["step"] < lease["steps"]
        assert not lease["done"]
        reports: list[dict[str, Any]] = []
        result = host.call("train", on_progress=reports.append, **request)
        assert reports[0]["step"] > lease["step"]
        assert result["digest"] == expected["digest"]
        assert result["loss"] == expected["loss"]
        assert host.call("train", **request) == result  # done: nothing is trained again

        with pytest.raises(IntegrityError) as differs:
            host.call(
                "sync",
                target={"version": 0, "weights_digest": "0" * 64},
                checkpoint={"version": 0, "path": str(run.weights)},
                updates=[],
            )
        assert differs.value.code == "replica-differs"
        with pytest.raises(TalkootError, match="no operation"):
            host.call("dance")

        host.call("settle", lease_id=task.lease.lease_id, accepted=True)
        child = host._living_child()
        closer = threading.Thread(target=host.close)
        with pytest.raises(UnavailableError):
            host.call(
                "train",
                on_progress=lambda report: None if closer.ident else closer.start(),
                **train_request(run, range(30, 130)),
            )
        closer.join()
        assert child.process.returncode == 0  # the end of its input is a clean end too
        with pytest.raises(UnavailableError) as closed:
            host.call("state")
        assert closed.value.code == "trainer-closed"
    lease = opened(run, tmp_path / "killed").state()["lease"]
    assert 1 <= lease["step"] < lease["steps"]


def test_sigterm_checkpoints_and_exits_cleanly(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    work = tmp_path / "work"
    synced(run, work)
    with TrainerHost(work, "cpu", 1, tmp_path / "log", checkpoint_seconds=1e9) as host:
        # On Linux a child outlives the thread that started it only if somebody thought of that.
        starter = threading.Thread(target=host.start)
        starter.start()
        starter.join()
        child = host._living_child()
        host.call("open", **run.open_request)
        assert host._living_child() is child

        def terminate(report: dict[str, Any]) -> None:
            child.process.send_signal(signal.SIGTERM)

        # Its answer is "stopped", or it is gone before the answer is read.
        with pytest.raises(UnavailableError):
            host.call("train", on_progress=terminate, **train_request(run, range(100)))
        assert child.process.wait() == 0
    assert opened(run, work).state()["lease"]["step"] >= 1


def test_the_host_imports_no_torch() -> None:
    code = (
        "import talkoot.client.trainer_host, talkoot.client.hardware, talkoot.protocol.memory, "
        "talkoot.protocol.model, talkoot.protocol.schedule, talkoot.protocol.proof, sys; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_sent_and_what_is_kept_add_up_to_the_pseudo_gradient(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    trainer = synced(run, tmp_path / "work")
    task, blocks = run.task(range(4))
    result = trainer.train(task, blocks)
    assert trainer._replica is not None
    local = {name: p.clone() for name, p in trainer._replica.weights()}
    base = WeightsReader(run.weights, run.manifest)
    payload = PayloadReader(Path(result["payload_path"]), run.manifest, run.spec.uplink)
    kept = feedback_of(trainer, run)
    for name, tensor in local.items():
        sent = payload.decode(name).to_dense(tensor.numel()).reshape(tensor.shape)
        torch.testing.assert_close(sent + kept[name], base.get(name) - tensor, rtol=1e-6, atol=1e-9)

    trainer.settle(task.lease.lease_id, accepted=True)
    second, more = run.task(range(4, 8), round_number=2)
    result = trainer.train(second, more)
    payload = PayloadReader(Path(result["payload_path"]), run.manifest, run.spec.uplink)
    kept_now = feedback_of(trainer, run)
    for name, parameter in trainer._replica.weights():
        sent = payload.decode(name).to_dense(parameter.numel()).reshape(parameter.shape)
        carried = run.spec.feedback_decay * kept[name]
        start = base.get(name) - feedback_share(run.spec.feedback_start, 2) * kept[name]
        torch.testing.assert_close(
            sent + kept_now[name],
            start - parameter.detach() + carried,
            rtol=1e-6,
            atol=1e-8,
        )


def test_a_lease_starts_from_part_of_what_its_node_has_not_sent(
    make_run: MakeRun, tmp_path: Path
) -> None:
    # At the end of its schedule the rate is 0: what a lease ends with is what it started from.
    inner = InnerSpec(final_learning_rate_ratio=0.0, total_tokens=1000)
    run = make_run(inner=inner)
    trainer = synced(run, tmp_path / "work")
    task, blocks = run.task(range(4))
    trainer.train(task, blocks)
    trainer.settle(task.lease.lease_id, accepted=True)
    held = feedback_of(trainer, run)
    assert any(bool(kept.abs().max() > 0) for kept in held.values())
    task, blocks = run.task(range(4, 8), round_number=51, tokens_before=1000)
    trainer.train(task, blocks)
    base = WeightsReader(run.weights, run.manifest)
    assert trainer._replica is not None
    for name, weight in trainer._replica.weights():
        start = base.get(name) - run.spec.feedback_start / 2 * held[name]
        torch.testing.assert_close(weight.detach(), start)
    trainer.settle(task.lease.lease_id, accepted=True)

    task, blocks = run.task(range(8, 12), round_number=52, tokens_before=2000)
    trainer.train(task.model_copy(update={"fresh_state": True}), blocks)
    for name, weight in trainer._replica.weights():  # one that others can replay
        torch.testing.assert_close(weight.detach(), base.get(name))


def test_a_lease_with_fresh_state_is_the_same_whatever_its_node_did_before(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    first, first_blocks = run.task(range(4))
    task, blocks = run.task(range(4, 8), round_number=2)
    fresh = task.model_copy(update={"fresh_state": True})
    experienced, newcomer = synced(run, tmp_path / "old"), synced(run, tmp_path / "new")
    experienced.train(first, first_blocks)
    experienced.settle(first.lease.lease_id, accepted=True)
    held = feedback_of(experienced, run)
    sent = experienced.train(fresh, blocks)
    assert sent["digest"] == newcomer.train(fresh, blocks)["digest"]
    # What the old one held back is not lost: it is in its feedback still.
    kept = feedback_of(newcomer, run)
    for name, tensor in feedback_of(experienced, run).items():
        torch.testing.assert_close(tensor, kept[name] + held[name], rtol=0, atol=1e-8)

    # The coordinator, which knows neither of them, gets the same bytes.
    job = replay_of(newcomer, run, fresh, blocks, "fp32-adamw", sent["steps"])
    replayed = tmp_path / "replay.safetensors"
    assert replay_lease(job, replayed) == pytest.approx(sent["loss"], abs=1e-12)
    assert sha256_file(replayed)[0] == sent["digest"]
    with pytest.raises(ValueError, match="fresh"):
        replay_lease(replace(job, task=task), replayed)


def test_a_refused_contribution_goes_back_into_the_feedback(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    trainer = synced(run, tmp_path / "work")
    task, blocks = run.task(range(4))
    result = trainer.train(task, blocks)
    assert trainer._replica is not None
    base = WeightsReader(run.weights, run.manifest)
    expected = {name: base.get(name) - p for name, p in trainer._replica.weights()}
    other, other_blocks = run.task(range(4, 6))
    with pytest.raises(StateError) as unsettled:
        trainer.train(other, other_blocks)
    assert unsettled.value.code == "lease-unsettled"
    assert trainer.settle("f" * 32, accepted=False) == {"settled": False}
    assert trainer.settle(task.lease.lease_id, accepted=False) == {"settled": True}
    for name, tensor in feedback_of(trainer, run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9)
    before = feedback_of(trainer, run)
    assert trainer.settle(task.lease.lease_id, accepted=False) == {"settled": False}
    assert all(torch.equal(before[name], kept) for name, kept in feedback_of(trainer, run).items())
    assert not Path(result["payload_path"]).exists()
    assert trainer.state()["lease"] is None


def test_a_crash_before_the_result_is_current_is_repeated_to_the_same_bytes(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    task, blocks = run.task(range(4))
    expected = synced(run, tmp_path / "whole").train(task, blocks)
    trainer = synced(run, tmp_path / "crashing")

    def crash(*anything: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._opened.work, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(task, blocks)
    trainer = opened(run, tmp_path / "crashing")
    assert trainer.state()["lease"]["step"] == expected["steps"]
    assert not trainer.state()["lease"]["done"]
    assert trainer._opened.work.state.feedback is None
    assert trainer.train(task, blocks)["digest"] == expected["digest"]


def test_updates_bring_the_replica_to_the_digest_of_everybody(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    trainer = synced(run, tmp_path / "work")
    task, blocks = run.task(range(4))
    update = Path(trainer.train(task, blocks)["payload_path"])
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = apply_update(run.manifest, run.weights, update, run.spec.downlink, once)
    second = apply_update(run.manifest, once, update, run.spec.downlink, twice)

    node = synced(run, tmp_path / "node")
    assert node.sync(1, first, None, [update]) == {"version": 1, "weights_digest": first}
    assert node.verify() == node.sync(1, first, None, [])
    with pytest.raises(ProtocolError) as mismatch:
        node.sync(3, second, None, [update])
    assert mismatch.value.code == "updates-mismatch"

    late = opened(run, tmp_path / "late")
    assert late.state() == {
        "version": None,
        "weights_digest": None,
        "lease": None,
        "recipe": "fp32-adamw",
        "falls": 0,
    }
    assert late.sync(2, second, (0, run.weights), [update, update])["version"] == 2
    assert late.verify()["weights_digest"] == second
    with pytest.raises(ProtocolError) as stale:
        late.train(task, blocks)
    assert stale.value.code == "wrong-base"


def test_sync_finds_a_planted_bit_flip_and_a_checkpoint_heals_it(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    trainer = synced(run, tmp_path / "work")
    task, blocks = run.task(range(4))
    update = Path(trainer.train(task, blocks)["payload_path"])
    target = apply_update(run.manifest, run.weights, update, run.spec.downlink, tmp_path / "next")
    work = trainer._opened.work
    assert work.state.published is not None
    path = work.path(work.state.published.file)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)

    assert trainer.verify()["weights_digest"] != run.weights_digest
    with pytest.raises(IntegrityError) as unmoved:
        trainer.sync(0, run.weights_digest, None, [])
    assert unmoved.value.code == "replica-differs"
    with pytest.raises(IntegrityError) as differs:
        trainer.sync(1, target, None, [update])
    assert differs.value.code == "replica-differs"
    assert trainer.state()["version"] == 0  # the pointer has not moved
    trainer.sync(1, target, (0, run.weights), [update])
    assert trainer.verify() == {"version": 1, "weights_digest": target}

    assert work.state.published is not None
    work.path(work.state.published.file).write_bytes(b"torn")
    with pytest.raises(IntegrityError) as torn:
        trainer.sync(2, target, None, [update])
    assert torn.value.code == "replica-differs"


def test_the_proof_is_the_loss_that_the_coordinator_recomputes(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    trainer = synced(run, tmp_path / "work")
    proof = trainer.prove(NONCE, 3)
    spec = run.spec
    expected, mark = proof_result(
        dict(trainer._opened.config),
        NONCE,
        sequence_length=spec.sequence_length,
        micro_batch=spec.micro_batch,
        inner=spec.inner,
        steps=3,
    )
    assert proof["loss"] == pytest.approx(expected, abs=1e-6)
    assert proof["sketch"] == pytest.approx(mark, abs=1e-6)
    assert proof["loss"] != pytest.approx(
        trainer.prove("f" * 32, 3)["loss"], abs=1e-6
    )  # another nonce, another loss
    assert proof["tokens_per_second"] > 0
    assert proof["predicted_bytes"] > 12 * spec.parameters
    assert trainer.verify()["weights_digest"] == run.weights_digest


def test_a_loss_that_is_not_finite_is_reported_and_costs_only_the_lease(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(inner=InnerSpec(learning_rate=1e30, clip_norm=0.0))
    trainer = synced(run, tmp_path / "work", checkpoint_seconds=0)
    task, blocks = run.task(range(4))
    with pytest.raises(TalkootError) as diverged:
        trainer.train(task, blocks)
    assert diverged.value.code == "non-finite-loss"
    assert trainer.state()["lease"] is None
    assert trainer.verify()["weights_digest"] == run.weights_digest


def test_a_task_that_is_not_what_its_blocks_are_is_refused(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    trainer = synced(run, tmp_path / "work")
    task, blocks = run.task(range(4))
    with pytest.raises(ProtocolError) as fewer:
        trainer.train(task, blocks[:3])
    assert fewer.value.code == "lease-mismatch"
    other: RoundTask = task.model_copy(update={"run_id": "other"})
    with pytest.raises(ProtocolError) as stranger:
        trainer.train(other, blocks)
    assert stranger.value.code == "other-run"
    blocks[0].write_bytes(b"\xff" * 1024)
    with pytest.raises(IntegrityError):
        trainer.train(task, blocks)


def test_a_directory_is_never_used_for_another_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(uplink=CodecSpec(kind="dense"))
    synced(run, tmp_path / "work")
    trainer = Trainer(tmp_path / "work", "cpu")
    with pytest.raises(StateError) as taken:
        trainer.open(run.spec.model_copy(update={"run_id": "other"}), *run.open_paths)
    assert taken.value.code == "other-run"
    with pytest.raises(IntegrityError):
        trainer.open(run.spec.model_copy(update={"manifest": run.spec.model}), *run.open_paths)


@pytest.mark.parametrize("recipe", ["bf16-backward-adamw8", "bf16-offload-adamw"])
def test_a_lease_of_another_recipe_survives_a_stop_and_is_repeated_to_the_same_payload(
    make_run: MakeRun, tmp_path: Path, recipe: str
) -> None:
    run = make_run()
    task, blocks = run.task(range(2))
    task = task.model_copy(update={"fresh_state": True})

    def trainer(name: str) -> Trainer:
        made = Trainer(tmp_path / name, "cpu", recipe=recipe, checkpoint_seconds=0)
        made.open(run.spec, *run.open_paths)
        made.sync(0, run.weights_digest, (0, run.weights), [])
        return made

    whole = trainer("whole").train(task, blocks)
    with pytest.raises(UnavailableError):
        trainer("broken").train(task, blocks, should_stop=_after(2))
    steps: list[int] = []
    resumed = trainer("broken").train(
        task, blocks, on_progress=lambda report: steps.append(report["step"])
    )
    assert steps[0] == 3
    assert resumed["digest"] == whole["digest"]

    job = ReplayJob(
        config=dict(trainer("other")._opened.config),
        spec=run.spec,
        manifest=run.manifest,
        corpus=run.corpus,
        task=task,
        base=run.weights,
        blocks=blocks,
        recipe=recipes.get(recipe),
        steps=whole["steps"],
    )
    replay_lease(job, tmp_path / "replay.safetensors")
    assert sha256_file(tmp_path / "replay.safetensors")[0] == whole["digest"]


def test_a_lease_begun_under_another_recipe_goes_on_with_what_was_trained(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    task, blocks = run.task(range(2))
    with pytest.raises(UnavailableError):
        synced(run, tmp_path / "work", checkpoint_seconds=0).train(
            task, blocks, should_stop=_after(2)
        )
    second = Trainer(tmp_path / "work", "cpu", recipe="bf16-adamw", checkpoint_seconds=0)
    second.open(run.spec, *run.open_paths)
    steps: list[int] = []
    second.train(task, blocks, on_progress=lambda report: steps.append(report["step"]))
    assert steps[0] == 3
