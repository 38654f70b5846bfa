from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from talkoot.protocol.errors import ConfigError, ProtocolError
from talkoot.protocol.model import (
    FAMILIES,
    FORBIDDEN_KEYS,
    MAX_CONFIG,
    build_model,
    config_bytes,
    count_parameters,
    load_pretrained,
    named_trainable,
    parse_config,
    preset,
)

PUBLISHED_PARAMETERS = {
    "nano": 111_168,
    "tiny": 1_038_208,
    "small": 4_083_456,
    "smollm2-135m": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "olmo-2-7b": 7_298_617_344,
    "olmoe-1b-7b": 6_919_161_856,
}


def little(family: str) -> dict[str, Any]:
    """A very small config of a family."""
    if family == "gpt2":
        return {"model_type": family, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    return {
        "model_type": family,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_all_of_its_state_and_builds_alike_from_a_seed_or_from_weights(
    family: str,
) -> None:
    torch.set_num_threads(1)
    config = parse_config(config_bytes(little(family)))
    model = build_model(config, seed=3, device="cpu")
    same = build_model(config, seed=3, device="cpu")
    unset = build_model(config, seed=None, device="cpu")
    outline = build_model(config, seed=None, device="cpu", meta=True)
    names = [name for name, _ in named_trainable(model)]
    assert names == [name for name, _ in named_trainable(unset)]
    assert names == [name for name, _ in named_trainable(outline)]
    assert all(
        torch.equal(mine, other)
        for mine, other in zip(model.parameters(), same.parameters(), strict=True)
    )
    # Parameters are all the state there is: nothing would be lost in a published version.
    assert set(model.state_dict()) == {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    with torch.no_grad():
        for source, target in zip(model.parameters(), unset.parameters(), strict=True):
            target.copy_(source)
    ids = torch.arange(48).reshape(2, 24)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    again = unset(input_ids=ids, labels=ids, use_cache=False).loss
    assert float(loss.detach()) == float(again.detach())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_presets_have_the_published_numbers_of_parameters() -> None:
    assert {
        name: count_parameters(preset(name)) for name in PUBLISHED_PARAMETERS
    } == PUBLISHED_PARAMETERS


def test_threads_that_build_at_once_get_the_weights_of_their_own_seeds() -> None:
    config = preset("nano")

    def drawn(seed: int) -> bytes:
        model = build_model(config, seed=seed, device="cpu")
        return b"".join(p.detach().numpy().tobytes() for p in model.parameters())

    alone = [drawn(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(drawn, range(8))) == alone


def test_building_leaves_the_random_state_of_the_caller_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    build_model(preset("nano"), seed=1, device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("key", sorted(FORBIDDEN_KEYS | {"_name_or_path", "_attn_implementation"}))
def test_a_config_that_could_load_code_from_elsewhere_is_refused_at_any_depth(key: str) -> None:
    value = {"AutoModelForCausalLM": "evil--modeling.Evil"}
    for config in ({**preset("nano"), key: value}, {**preset("nano"), "deep": [{key: value}]}):
        with pytest.raises(ProtocolError, match="could load or run code"):
            parse_config(json.dumps(config).encode())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "whisper"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"num_hidden_layers": 10**6}, "over"),
        ({"hidden_size": 10**12}, "out of range"),
        ({"model_type": {}}, "model_type"),
        ({"hidden_size": 10**400}, "out of range"),
        ({"rms_norm_eps": float("inf")}, "out of range"),
        ({"rms_norm_eps": float("nan")}, "out of range"),
        ({"hidden_act": "x" * 300}, "256"),
        ({"a": [[[[[[[[1]]]]]]]]}, "deeper"),
    ],
)
def test_an_absurd_config_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        parse_config(json.dumps({**preset("nano"), **change}).encode())


def test_a_config_that_asks_for_too_many_parameters_costs_no_memory() -> None:
    config = {**preset("nano"), "hidden_size": 2**20, "intermediate_size": 2**22}
    with pytest.raises(ProtocolError, match="over the cap"):
        build_model(config, seed=1, device="cpu")


def test_a_config_that_transformers_cannot_build_is_a_protocol_error() -> None:
    for change in ({"num_attention_heads": 0}, {"hidden_act": "no-such"}, {"hidden_size": -4}):
        with pytest.raises(ProtocolError, match="cannot build"):
            build_model({**preset("nano"), **change}, seed=1, device="cpu")


@given(st.binary(max_size=200) | st.just(b"[" * MAX_CONFIG) | st.just(b" " * (MAX_CONFIG + 1)))
def test_bytes_that_are_no_config_are_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_config(data)


def test_the_encoding_of_a_config_does_not_depend_on_the_order_of_its_keys() -> None:
    config = preset("nano")
    turned = dict(reversed(config.items()))
    assert config_bytes(config) == config_bytes(turned)
    assert parse_config(config_bytes(config)) == config


def test_an_exported_model_loads_again_with_a_config_that_may_be_published(
    tmp_path: Path,
) -> None:
    model = build_model(preset("nano"), seed=9, device="cpu")
    model.save_pretrained(tmp_path)  # type: ignore[operator]  # a method of PreTrainedModel
    config, loaded = load_pretrained(tmp_path)
    rebuilt = build_model(parse_config(config_bytes(config)), seed=None, device="cpu")
    assert [name for name, _ in named_trainable(rebuilt)] == [
        name for name, _ in named_trainable(model)
    ]
    for mine, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ConfigError, match=r"not a transformers model directory"):
        load_pretrained(tmp_path / "nowhere")


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="nano"):
        preset("huge")
