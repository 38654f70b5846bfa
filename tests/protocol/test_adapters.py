"""Adapters beside frozen weights: nothing but the adapters moves, and merging changes no answer."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from tests.protocol.test_model import little
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from talkoot.protocol import recipes
from talkoot.protocol.adapters import (
    adapted_outline,
    base_manifest,
    build_adapted,
    draw_adapters,
    drawn_base,
    merged,
)
from talkoot.protocol.codec import encode_with_feedback
from talkoot.protocol.errors import CapacityError, ConfigError
from talkoot.protocol.manifest import manifest_of
from talkoot.protocol.messages import AdapterSpec, ArtifactRef, CodecSpec, InnerSpec
from talkoot.protocol.model import FAMILIES, build_model, named_trainable
from talkoot.protocol.recipes import ADAPTER_RECIPES
from talkoot.protocol.replica import Replica, new_replica

CONFIG = {**little("llama"), "vocab_size": 260, "tie_word_embeddings": True}


def spec(*targets: str, rank: int = 4) -> AdapterSpec:
    return AdapterSpec(
        rank=rank,
        alpha=8.0,
        targets=targets or ("q_proj", "v_proj", "down_proj"),
        base=ArtifactRef(digest="0" * 64, size_bytes=4),
        base_dtype="float32",
    )


def made(name: str, seed: int | None = 5) -> Replica:
    base = drawn_base(CONFIG, spec(), 3)
    return new_replica(
        CONFIG,
        recipes.get(name),
        InnerSpec(),
        seed=seed,
        device="cpu",
        adapter=spec(),
        base=base,
    )


def batches(count: int) -> list[Tensor]:
    starts = np.random.default_rng(0).integers(0, 200, (count, 2))
    return [torch.tensor([[start + i for i in range(32)] for start in row]) for row in starts]


def skip_without_package(name: str) -> None:
    package = recipes.get(name).package
    if package is not None:
        pytest.importorskip(package)


@pytest.mark.parametrize("family", sorted(FAMILIES - {"gpt2"}))
def test_fresh_adapters_change_no_logit_of_any_family_and_are_all_that_is_trained(
    family: str,
) -> None:
    config = little(family)
    real = build_model(config, seed=3, device="cpu")
    head = real.get_output_embeddings()  # type: ignore[operator]
    layers = {
        name.rpartition(".")[2]
        for name, module in real.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    weights = dict(real.named_parameters())
    adapter = spec(*sorted(layers))
    model = build_adapted(
        config,
        adapter,
        weights.__getitem__,
        dtype=torch.float32,
        quantise=False,
        seed=1,
        device="cpu",
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, real(input_ids=ids).logits)
    names = [name for name, _ in named_trainable(model)]
    assert names
    assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B"}
    assert manifest_of(named_trainable(model)) == manifest_of(
        named_trainable(adapted_outline(config, adapter))
    )
    assert [t.name for t in base_manifest(config, adapter).tensors] == list(weights)


@pytest.mark.parametrize("name", list(ADAPTER_RECIPES))
def test_the_loss_falls_a_resumed_replica_repeats_the_bits_and_the_codec_takes_the_difference(
    name: str,
) -> None:
    skip_without_package(name)
    torch.set_num_threads(1)
    replica = made(name)
    start = {key: tensor.clone() for key, tensor in replica.weights()}
    frozen = [p.clone() for p in replica.model.parameters() if not p.requires_grad]
    data = batches(26)
    losses = [replica.step(ids, 2e-2) for ids in data[:24]]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.07
    still = [p for p in replica.model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(frozen, still, strict=True))

    resumed = made(name, seed=None)
    weights = {key: tensor.clone() for key, tensor in replica.weights()}
    states = {key: tensor.clone() for key, tensor in replica.state()}
    resumed.load_weights(weights.__getitem__)
    for key, tensor in resumed.state():
        tensor.copy_(states[key])
    resumed.steps = replica.steps
    for ids in data[24:]:
        assert replica.step(ids, 1e-2) == resumed.step(ids, 1e-2)
    for (key, one), (_, other) in zip(replica.weights(), resumed.weights(), strict=True):
        assert torch.equal(one, other)
        delta = replica.as_loaded(start[key]) - one
        sent, _ = encode_with_feedback(delta, None, CodecSpec(chunk=64, keep=8), 0.95)
        assert sent.numel == delta.numel()


@pytest.mark.parametrize("name", list(ADAPTER_RECIPES))
def test_a_step_runs_on_fake_tensors(name: str) -> None:
    skip_without_package(name)
    shapes = {t.name: t.shape for t in base_manifest(CONFIG, spec()).tensors}
    with FakeTensorMode():
        replica = new_replica(
            CONFIG,
            recipes.get(name),
            InnerSpec(),
            seed=None,
            device="cpu",
            adapter=spec(),
            base=lambda tensor: torch.empty(shapes[tensor]),
        )
        replica._loss(torch.zeros((2, 32), dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for _, p in replica._parameters)


def test_a_merged_model_gives_the_logits_of_base_and_adapters() -> None:
    base = drawn_base(CONFIG, spec(), 3)
    model = build_adapted(
        CONFIG, spec(), base, dtype=torch.float32, quantise=False, seed=1, device="cpu"
    )
    with torch.no_grad():
        for name, parameter in named_trainable(model):
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1)
    adapters = dict(named_trainable(model))
    plain = build_model(CONFIG, seed=None, device="cpu")
    parameters = dict(plain.named_parameters())
    for name, weight in merged(CONFIG, spec(), base, lambda name: adapters[name].detach()):
        parameters.pop(name).data.copy_(weight)
    assert not parameters
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


def test_what_is_held_in_four_bits_takes_little_memory_and_errs_little() -> None:
    pytest.importorskip("bitsandbytes")
    exact, packed = made("lora-fp32"), made("qlora-nf4-fp32")
    ids = batches(1)[0]
    assert packed.step(ids, 1e-3) == pytest.approx(exact.step(ids, 1e-3), abs=0.05)
    layer: Any = packed.model.get_submodule("model.layers.0.mlp.up_proj")  # has no adapter
    assert layer.weight.numel() == 0
    held = layer._packed._packed
    assert held.numel() * held.element_size() * 2 == layer.in_features * layer.out_features


def test_adapters_are_drawn_alike_everywhere_and_b_begins_at_zero() -> None:
    one, other = (dict(made("lora-fp32", seed=4).weights()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name, tensor in one.items():
        assert bool(tensor.any()) != name.endswith("lora_B")
    model = made("lora-fp32", seed=4).model
    draw_adapters(model, 5)
    first = next(iter(one))
    assert not torch.equal(dict(named_trainable(model))[first], one[first])


def test_targets_that_are_not_there_or_are_the_head_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"layer named 'qq_proj': choose from down_proj"):
        adapted_outline(CONFIG, spec("qq_proj"))
    with pytest.raises(ConfigError, match="the output head"):
        adapted_outline(CONFIG, spec("lm_head"))


def test_a_recipe_for_the_other_kind_of_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="for an adapter run: choose one of lora-bf16"):
        made("fp32-adamw")
    with pytest.raises(ConfigError, match="for this run"):
        new_replica(CONFIG, recipes.get("lora-fp32"), InnerSpec(), seed=1, device="cpu")


def test_four_bits_without_bitsandbytes_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(CapacityError, match=r"install talkoot\[adapters\]") as raised:
        made("qlora-nf4")
    assert raised.value.code == "package-missing"
