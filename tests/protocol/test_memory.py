from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.limits import GIB
from talkoot.protocol.memory import format_size, parse_size, predict
from talkoot.protocol.messages import InnerSpec
from talkoot.protocol.model import build_model, count_parameters, preset
from talkoot.protocol.recipes import get
from talkoot.protocol.replica import build_replica


def measured_peak(config: dict[str, Any], sequence_length: int, micro_batch: int) -> int:
    """Most bytes that torch's CPU allocator held at once over two steps, by its own count."""
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        model = build_model(config, seed=1, device="cpu")
        replica = build_replica(model, get("fp32-adamw"), InnerSpec())
        for _ in range(2):
            ids = torch.randint(0, 256, (micro_batch, sequence_length))
            replica.step(ids, 1e-3)
    results = prof.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("change", "sequence_length", "micro_batch"),
    [
        ({}, 256, 4),  # activations weigh most
        ({}, 64, 1),  # gradients do
        ({"vocab_size": 8000}, 128, 4),  # logits do
        ({"vocab_size": 8000, "tie_word_embeddings": False}, 64, 1),
        ({"num_key_value_heads": 1}, 256, 2),
        ({"model_type": "qwen2"}, 256, 2),
    ],
)
def test_the_prediction_is_within_a_quarter_of_the_measured_peak(
    change: dict[str, Any], sequence_length: int, micro_batch: int
) -> None:
    config = {**preset("small"), **change}
    predicted = predict(config, sequence_length, micro_batch).device_bytes
    measured = measured_peak(config, sequence_length, micro_batch)
    assert predicted == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("name", ["small", "llama-2-7b", "mistral-7b", "smollm2-135m"])
def test_without_a_count_the_parameters_are_derived_from_the_config(name: str) -> None:
    config = preset(name)
    parameters = count_parameters(config)
    assert predict(config, 128, 1) == predict(config, 128, 1, parameters=parameters)


def test_a_7b_replica_under_this_recipe_needs_more_than_sixteen_bytes_a_parameter() -> None:
    plan = predict(preset("llama-2-7b"), 2048, 1)
    assert plan.device_bytes > 100 * GIB
    assert plan.breakdown["weights"] == 4 * 6_738_415_616
    assert plan.disk_bytes == 40 * 6_738_415_616


def test_a_config_without_its_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        predict({"model_type": "llama"}, 128, 1)


@given(st.integers(0, 2**49))
def test_a_formatted_size_reads_back_to_three_digits(size: int) -> None:
    text = format_size(size)
    assert len(text.split()[0].replace(".", "")) <= 3
    assert parse_size(text) == pytest.approx(size, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * GIB),
        (" 1.5 g ", 3 * GIB // 2),
        ("20GB", 20 * 10**9),
        ("0.1MB", 100_000),
        ("512", 512),
        ("2tib", 2048 * GIB),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "20 Gib it", "1.5.2G", "٣GiB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)
