"""The simulation against real tensors: the same tracker, and torch's own profiler."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from talkoot.protocol import memory
from talkoot.protocol.messages import InnerSpec
from talkoot.protocol.model import build_model, preset
from talkoot.protocol.planner import simulate as planner
from talkoot.protocol.planner.simulate import simulate
from talkoot.protocol.planner.tracker import Trace, Tracker
from talkoot.protocol.recipes import RECIPES, Recipe, get
from talkoot.protocol.replica import DTYPES, build_replica

MOE = {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}
GQA = {"num_key_value_heads": 1, "vocab_size": 3000, "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def traced(
    config: dict[str, Any], recipe: Recipe, batch: tuple[int, int], batches: int = 1
) -> dict[str, Trace]:
    """Two real steps on real tensors, by the same tracker."""
    gc.collect()
    with Tracker() as tracker:
        replica = planner.build(tracker, config, recipe, seed=1)
        planner.train(tracker, replica, [[torch.zeros(batch, dtype=torch.int64)] * batches] * 2)
        tracker.close()
    replica.release()
    traces: dict[str, Trace] = tracker.traces
    return traces


def profiled(
    config: dict[str, Any], recipe: Recipe, batch: tuple[int, int], batches: int = 1
) -> int:
    """Most bytes that torch's allocator held over two steps, by torch's own count."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        model = build_model(config, seed=1, device="cpu", dtype=DTYPES[recipe.weights])
        replica = build_replica(model, recipe, InnerSpec())
        for _ in range(2):
            replica.step([torch.zeros(batch, dtype=torch.int64)] * batches, 1e-5)
    events = prof.profiler.kineto_results.events()
    held = peak = 0
    changes = [event for event in events if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def training_peak(plan: memory.MemoryPlan, tier: str = "device") -> int:
    """The peak of the training step alone: nothing is encoded in what it is compared with."""
    kept = {f"{tier}_{phase}" for phase in ("build", "forward", "backward", "update")}
    return max((size for phase, size in plan.phases.items() if phase in kept), default=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fp32-adamw", {}),
        ("fp32-adamw-ckpt", GQA),
        ("fp32-backward-adamw8", {}),
        ("bf16-backward-adafactor", GQA),
        ("fp32-offload-adamw", {}),
        ("fp32-backward-adamw", MOE),
    ],
)
def test_fake_tensors_peak_as_real_ones_do(name: str, change: dict[str, Any]) -> None:
    config = {**preset("nano"), **change}
    plan = simulate(config, get(name), sequence_length=64, micro_batch=2)
    real = traced(config, get(name), (2, 64))
    for tier in ("device", "host"):
        assert training_peak(plan, tier) == pytest.approx(real[tier].peak, rel=0.0005, abs=1024)


@pytest.mark.parametrize("name", ["fp32-adamw", "fp32-backward-adafactor"])
def test_the_prediction_is_within_five_per_cent_of_torchs_own_profiler(name: str) -> None:
    config = {**preset("tiny"), "vocab_size": 2000}
    plan = simulate(config, get(name), sequence_length=128, micro_batch=1)
    assert training_peak(plan) == pytest.approx(profiled(config, get(name), (1, 128)), rel=0.05)


@pytest.mark.parametrize("name", ["fp32-adamw", "fp32-adamw-ckpt", "fp32-offload-adamw"])
def test_gradients_that_wait_for_the_next_batch_are_counted_as_real_ones_and_as_torch_counts(
    name: str,
) -> None:
    config, recipe = {**preset("nano"), "vocab_size": 1000}, get(name)
    plain, plan = (
        simulate(config, recipe, sequence_length=64, micro_batch=4, accumulated=accumulated)
        for accumulated in (False, True)
    )
    real = traced(config, recipe, (4, 64), batches=3)  # and two show all that three do
    for tier in ("device", "host"):
        assert training_peak(plan, tier) == pytest.approx(real[tier].peak, rel=0.002, abs=2048)
    if recipe.gradients == "kept":
        assert plan.phases["device_forward"] > plain.phases["device_forward"]
        counted = profiled(config, recipe, (4, 64), batches=3)
        assert training_peak(plan) == pytest.approx(counted, rel=0.05)
    else:  # they wait on the host
        assert plan.device_bytes == plain.device_bytes


def test_a_recipe_that_cannot_accumulate_is_planned_as_ever() -> None:
    plain, plan = (
        simulate(
            preset("nano"),
            get("fp32-backward-adafactor"),
            sequence_length=16,
            micro_batch=1,
            accumulated=accumulated,
        )
        for accumulated in (False, True)
    )
    assert plan == plain


@pytest.mark.parametrize("name", ["bf16-backward-adamw4", "bf16-offload-adamw"])
def test_one_step_shows_all_that_two_do(name: str) -> None:
    one, two = (
        simulate(preset("nano"), get(name), sequence_length=64, micro_batch=1, steps=steps)
        for steps in (1, 2)
    )
    for phase, size in two.phases.items():
        assert one.phases[phase] == pytest.approx(size, abs=1024)  # the first loss is still alive
    assert (one.device_bytes, one.host_bytes) == (two.device_bytes, two.host_bytes)


def test_the_ends_of_an_update_show_all_that_the_whole_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from talkoot.protocol import rules

    monkeypatch.setattr(rules, "SLAB", 2048)
    for name in ("bf16-backward-adamw8", "fp32-backward-adafactor"):
        recipe = get(name)
        short = simulate(preset("nano"), recipe, sequence_length=32, micro_batch=1)
        with monkeypatch.context() as patch:
            patch.setattr(planner, "_ends_of", lambda real: real)
            whole = simulate(preset("nano"), recipe, sequence_length=32, micro_batch=1)
        assert short.phases == whole.phases


def test_a_larger_model_is_planned_without_its_memory() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = {**preset("llama-2-7b"), "num_hidden_layers": 2}
    plan = simulate(config, get("bf16-adamw"), sequence_length=512, micro_batch=1)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert plan.allocated_bytes > 4 * 2**30
    assert grown < 2**29


def test_the_encoder_is_counted_where_the_recipe_holds_its_weights() -> None:
    config = {**preset("nano"), "vocab_size": 40_000}  # so that one tensor dwarfs the rest
    largest = 40_000 * 64
    on_device, off = (
        simulate(config, get(name), sequence_length=8, micro_batch=1).phases
        for name in ("bf16-backward-adafactor", "fp32-offload-adamw")
    )
    held = on_device["device_between"]
    assert on_device["device_encode"] - held == pytest.approx(14 * largest, rel=0.05)
    assert "device_encode" not in off
    assert off["host_encode"] > off["host_build"]


def test_every_recipe_can_be_simulated() -> None:
    config = {**preset("nano"), "num_hidden_layers": 1}
    for recipe in RECIPES.values():
        plan = simulate(config, recipe, sequence_length=16, micro_batch=1)
        assert plan.smallest_cap_bytes >= plan.allocated_bytes > 0
        assert plan.breakdown["disk_published"] > 0
