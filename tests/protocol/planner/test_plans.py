from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from talkoot.protocol.errors import CapacityError
from talkoot.protocol.memory import MemoryPlan
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.model import preset
from talkoot.protocol.planner import plans
from talkoot.protocol.recipes import get

SIZES: dict[str, Any] = {"sequence_length": 16, "micro_batch": 1}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plans.CACHE_VARIABLE, str(tmp_path / "plans"))


def test_a_simulation_is_made_once_in_a_child_and_found_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = get("fp32-adamw")
    assert plans.known(preset("nano"), recipe, **SIZES) is None
    made = plans.simulated(preset("nano"), [recipe], **SIZES)
    monkeypatch.setattr(plans, "_ask_child", lambda request: pytest.fail("asked again"))
    assert plans.simulated(preset("nano"), [recipe], **SIZES) == made
    assert plans.known(preset("nano"), recipe, **SIZES) == made["fp32-adamw"]
    assert made["fp32-adamw"].source == "simulation"
    # Of another length, codec, recipe or code it says nothing.
    assert plans.known(preset("nano"), recipe, sequence_length=32, micro_batch=1) is None
    assert plans.known(preset("nano"), recipe, **SIZES, codec=CodecSpec(kind="dense")) is None
    assert plans.known(preset("nano"), get("amp-adamw"), **SIZES) is None
    monkeypatch.setattr(plans, "code_digest", lambda: "another")
    assert plans.known(preset("nano"), recipe, **SIZES) is None


def test_a_damaged_cache_file_is_no_plan() -> None:
    recipe = get("fp32-adamw")
    plan = plans.quick(preset("nano"), recipe, **SIZES)
    assert plan.source == "formula"
    plans.keep(plan, preset("nano"), **SIZES, codec=CodecSpec())
    (file,) = plans.cache_directory().iterdir()
    for damage in (b"", b"[]", b"{", b'{"recipe": 1}', b"\xff" * 100, b" " * 2**20):
        file.write_bytes(damage)
        assert plans.known(preset("nano"), recipe, **SIZES) is None


def test_plans_for_steps_of_several_batches_are_kept_apart_where_a_recipe_makes_such() -> None:
    config, codec = preset("nano"), CodecSpec()
    kept, freed = get("fp32-adamw"), get("fp32-backward-adamw")
    summed = plans.quick(config, kept, **SIZES, accumulated=True)
    assert summed.phases["device_forward"] > plans.quick(config, kept, **SIZES).allocated_bytes
    plans.keep(summed, config, **SIZES, codec=codec, accumulated=True)
    assert plans.known(config, kept, **SIZES) is None
    assert plans.known(config, kept, **SIZES, accumulated=True) == summed
    plain = plans.quick(config, freed, **SIZES)
    plans.keep(plain, config, **SIZES, codec=codec)
    assert plans.known(config, freed, **SIZES, accumulated=True) == plain


def test_a_plan_survives_json() -> None:
    plan = plans.quick(preset("nano"), get("bf16-offload-adamw"), **SIZES)
    assert MemoryPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_the_shipped_table_knows_what_waiting_gradients_take_where_memory_is_short() -> None:
    sizes: dict[str, Any] = {"sequence_length": 2048, "micro_batch": 1}
    for name in ("bf16-adamw", "bf16-offload-adamw"):
        plain, summed = (
            plans.known(preset("llama-2-7b"), get(name), **sizes, accumulated=accumulated)
            for accumulated in (False, True)
        )
        assert plain is not None
        assert summed is not None
        assert plain.device_bytes <= summed.device_bytes < 1.1 * plain.device_bytes


def test_the_shipped_table_answers_for_the_usual_models() -> None:
    plan = plans.quick(preset("llama-2-7b"), get("bf16-adamw"), sequence_length=2048, micro_batch=1)
    assert plan.source == "table"
    assert plan.allocated_bytes / 2**30 == pytest.approx(50.3, abs=0.1)


def test_what_the_child_refuses_is_told_in_its_sentence() -> None:
    broken = {**preset("nano"), "num_attention_heads": 0}
    with pytest.raises(CapacityError, match="cannot build"):
        plans.simulated(broken, [get("fp32-adamw")], **SIZES)


def test_comments_do_not_change_the_code_digest_and_an_unwritable_cache_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert len(plans.code_digest()) == 64
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(plans.CACHE_VARIABLE, str(file / "below"))
    plan = plans.quick(preset("nano"), get("fp32-adamw"), **SIZES)
    plans.keep(plan, preset("nano"), **SIZES, codec=CodecSpec())
    assert plans.known(preset("nano"), get("fp32-adamw"), **SIZES) is None


def test_many_threads_may_ask_for_the_codes_digest_at_once() -> None:
    plans._code_digest.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: plans.code_digest(), range(16)))
    assert len(set(found)) == 1
