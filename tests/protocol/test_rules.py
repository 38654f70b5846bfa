"""The update rules against torch's own optimizers, and what their roundings do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from talkoot.protocol import recipes, rules
from talkoot.protocol.lowbit import Table, dynamic_levels, levels_of
from talkoot.protocol.messages import InnerSpec
from talkoot.protocol.rules import Adafactor, SlabAdamW, Step, write

INNER = InnerSpec(clip_norm=0.0)
CPU = torch.device("cpu")
ONE = torch.ones(())


def _step(number: int, *, rate: float = 1e-2, decay: float = 0.1) -> Step:
    return Step(number, rate, decay, ONE, seed=number)


def _gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape) * 0.1 for _ in range(count)]


@pytest.mark.parametrize("shape", [(70, 90), (5000,), (3, 40, 50)])
def test_the_slab_rule_with_fp32_everything_is_torch_adamw(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "SLAB", 1024)
    rule = SlabAdamW(recipes.get("fp32-adamw"), INNER, CPU)
    ours = torch.randn(shape)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=(INNER.beta1, INNER.beta2), eps=INNER.epsilon, weight_decay=0.1
    )
    states = rule.states(ours)
    for number, gradient in enumerate(_gradients(shape, 6), 1):
        theirs.grad = gradient.clone()
        optimizer.step()
        rule.update(ours, gradient, states, _step(number))
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(70, 90), (500,), (3, 40, 50)])
def test_adafactor_is_torch_adafactor_at_an_absolute_rate(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "SLAB", 1024)
    rule = Adafactor(recipes.get("fp32-backward-adafactor"), INNER)
    ours = torch.randn(shape) * 0.02
    theirs = torch.nn.Parameter(ours.clone())
    # A least scale of 1 makes torch's rate absolute as long as the weights are smaller.
    optimizer = torch.optim.Adafactor([theirs], lr=1e-2, eps=(1e-30, 1.0), weight_decay=0.1)
    states = rule.states(ours)
    for number, gradient in enumerate(_gradients(shape, 6), 1):
        theirs.grad = gradient.clone()
        optimizer.step()  # type: ignore[no-untyped-call]
        rule.update(ours, gradient, states, _step(number))
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bf16-backward-adamw8", "bf16-backward-adamw4", "bf16-adamw"])
@pytest.mark.parametrize("numel", [4096, 4097, 5000, 8200])
def test_the_size_of_a_slab_changes_nothing_but_the_dice(
    name: str, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(recipes.get(name), stochastic_rounding=False)
    if recipe.states == "bfloat16":
        recipe = dataclasses.replace(recipe, states="float32")
    results = []
    for slab in (1024, 2**22):
        monkeypatch.setattr(rules, "SLAB", slab)
        rule = SlabAdamW(recipe, INNER, CPU)
        torch.manual_seed(2)
        weights = torch.randn(numel).bfloat16()
        states = rule.states(weights)
        for number, gradient in enumerate(_gradients((numel,), 4), 1):
            rule.update(weights, gradient.bfloat16(), states, _step(number))
        results.append([weights, *states.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_stochastic_rounding_is_right_on_average_and_exact_where_nothing_is_to_round() -> None:
    dice = torch.Generator().manual_seed(7)
    values = torch.tensor([1.0, -1.0, 1.0 + 2**-9, -1.0 - 2**-9, 3e-5, 0.0]).repeat(40_000, 1)
    rounded = torch.empty(values.shape, dtype=torch.bfloat16)
    write(rounded, values.clone(), dice)
    mean = rounded.double().mean(0)
    np.testing.assert_allclose(mean.numpy(), values[0].double().numpy(), rtol=1e-4)
    assert rounded[:, [0, 1, 5]].float().equal(values[:, [0, 1, 5]])
    # Each value is one of its two neighbours.
    assert set(rounded[:, 2].float().tolist()) == {1.0, 1.0078125}


def test_small_updates_arrive_with_stochastic_rounding_and_are_lost_without() -> None:
    moved = {}
    for stochastic in (True, False):
        recipe = dataclasses.replace(recipes.get("bf16-adamw"), stochastic_rounding=stochastic)
        rule = SlabAdamW(recipe, INNER, CPU)
        torch.manual_seed(3)
        weights = (torch.randn(20_000) * 0.02).bfloat16()
        start = weights.double()
        states = rule.states(weights)
        for number in range(1, 101):
            gradient = torch.full((20_000,), -1.0, dtype=torch.bfloat16)
            rule.update(weights, gradient, states, _step(number, rate=1e-5, decay=0.0))
        # A constant gradient moves every weight by the rate in every step.
        moved[stochastic] = float((weights.double() - start).mean()) / (100 * 1e-5)
    assert moved[True] == pytest.approx(1, abs=0.05)
    assert moved[False] < 0.5


def test_a_bf16_second_moment_shrinks_even_where_a_step_is_below_its_rounding() -> None:
    inner = InnerSpec(beta2=0.999)
    rule = SlabAdamW(recipes.get("bf16-adamw"), inner, CPU)
    weights = torch.zeros(5000, dtype=torch.bfloat16)
    states = rule.states(weights)
    states["exp_avg_sq"].fill_(1.0)
    for number in range(1, 101):
        rule.update(weights, torch.zeros_like(weights), states, _step(number))
    expected = 0.999**100
    assert float(states["exp_avg_sq"].double().mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_a_quantised_state_is_the_nearest_level_of_its_block(bits: int, signed: bool) -> None:
    table = Table.make(bits, signed=signed, device=CPU)
    levels = levels_of(bits, signed=signed)
    assert len(levels) == len(set(levels)) == 2**bits
    assert max(levels) == 1
    assert (min(levels) < -0.8) == signed
    torch.manual_seed(5)
    values = torch.randn(4 * table.block) * torch.logspace(-6, 2, 4).repeat_interleave(table.block)
    values = values if signed else values.abs()
    codes, scales = table.quantise(values)
    assert codes.numel() == values.numel() * bits // 8
    back = table.restore(codes, scales)
    scaled = (values.view(4, -1) / scales[:, None]).view(-1)
    nearest = (scaled[:, None] - table.levels).abs().amin(1)
    got = (scaled - (back.view(4, -1) / scales[:, None]).view(-1)).abs()
    torch.testing.assert_close(got, nearest, rtol=1e-4, atol=1e-6)


def test_the_first_levels_are_frozen() -> None:
    assert dynamic_levels(4, 3, signed=True) == pytest.approx(
        [
            *(-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0),
            *(0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0),
        ]
    )
    assert dynamic_levels(8, 7, signed=True)[-2:] == pytest.approx([0.99296875, 1.0])


def test_levels_and_codes_are_torchao_s() -> None:
    # torchao is no dependency: install it to see that what was copied from the papers agrees.
    eight = pytest.importorskip("torchao.optim.subclass_8bit")
    four = pytest.importorskip("torchao.optim.subclass_4bit")
    torch.manual_seed(6)
    for bits, theirs, kind in ((8, eight, "OptimState8bit"), (4, four, "OptimState4bit")):
        for signed in (True, False):
            values = torch.randn(8192) if signed else torch.rand(8192)
            table = Table.make(bits, signed=signed, device=CPU)
            state = getattr(theirs, kind).zeros((8192,), signed, table.block, dtype=torch.float32)
            state.copy_(values)
            torch.testing.assert_close(table.levels, state.qmap)
            codes, scales = table.quantise(values)
            assert torch.equal(scales, state.scale)
            assert (codes != state.codes).sum() <= 2  # a tie, at most
            torch.testing.assert_close(
                table.restore(codes, scales), state.dequantize(), atol=1e-2, rtol=0
            )
