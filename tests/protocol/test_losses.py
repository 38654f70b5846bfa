from __future__ import annotations

from typing import Any

import pytest
import torch

from talkoot.protocol import losses
from talkoot.protocol.losses import chunked_loss, use_chunked_loss
from talkoot.protocol.model import FAMILIES, build_model

from .test_model import little


def _losses_and_gradients(
    config: dict[str, Any], dtype: torch.dtype
) -> tuple[list[float], list[list[torch.Tensor]]]:
    values, gradients = [], []
    torch.manual_seed(3)
    ids = torch.randint(0, config["vocab_size"], (3, 17))
    for chunked in (False, True):
        model = build_model(config, seed=4, device="cpu", dtype=dtype)
        if chunked:
            use_chunked_loss(model)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        values.append(float(loss.detach()))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    return values, gradients


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_chunked_loss_is_transformers_own_in_value_and_gradient(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 10)  # 48 predictions: four chunks and a rest
    values, (plain, chunked) = _losses_and_gradients(little(family), torch.float32)
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert len(plain) == len(chunked)
    for one, other in zip(plain, chunked, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)


def test_in_bf16_the_value_agrees_to_a_thousandth_and_gradients_to_a_hundredth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 10)
    values, (plain, chunked) = _losses_and_gradients(little("llama"), torch.bfloat16)
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    for one, other in zip(plain, chunked, strict=True):
        difference = (other.float() - one.float()).norm() / one.float().norm()
        assert difference < 1e-2


def test_a_head_with_a_bias_has_its_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    bias = torch.randn(20, requires_grad=True)
    ids = torch.randint(0, 20, (2, 9))
    logits = torch.nn.functional.linear(hidden[:, :-1], weight, bias).reshape(-1, 20)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    loss = chunked_loss(hidden, weight, bias, ids)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, (hidden, weight, bias))
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other, one)
