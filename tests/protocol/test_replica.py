"""Every recipe trains, resumes to the bit, and gives a pseudo-gradient that the codec takes."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from talkoot.protocol import recipes
from talkoot.protocol.codec import encode_with_feedback
from talkoot.protocol.errors import TalkootError
from talkoot.protocol.messages import CodecSpec, InnerSpec
from talkoot.protocol.recipes import RECIPES
from talkoot.protocol.replica import Replica, new_replica, on_host, tier
from talkoot.protocol.rules import FIRST

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
INNER = InnerSpec(learning_rate=3e-3, clip_norm=1.0)
FULL = [name for name, recipe in RECIPES.items() if recipe.adapter is None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(count: int, seed: int = 0) -> list[Tensor]:
    """Sequences that count up: (2, 32) each."""
    starts = np.random.default_rng(seed).integers(0, 200, (count, 2))
    return [torch.tensor([[start + i for i in range(32)] for start in row]) for row in starts]


def made(name: str, seed: int | None = 5, inner: InnerSpec = INNER) -> Replica:
    return new_replica(CONFIG, recipes.get(name), inner, seed=seed, device="cpu")


def same(one: Replica, other: Replica) -> bool:
    pairs = zip([*one.weights(), *one.state()], [*other.weights(), *other.state()], strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", FULL)
def test_the_loss_falls_and_a_resumed_replica_repeats_the_same_bits(name: str) -> None:
    replica = made(name)
    replica.seed = 11
    data = batches(24)
    losses = [replica.step(ids, 1e-2) for ids in data[:20]]
    assert losses[0] > 5.4
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3  # single batches differ by that much
    assert all(parameter.grad is None for parameter in replica.model.parameters())

    resumed = made(name, seed=None)
    weights = {key: tensor.clone() for key, tensor in replica.weights()}
    states = {key: tensor.clone() for key, tensor in replica.state()}
    resumed.load_weights(weights.__getitem__)
    for key, tensor in resumed.state():
        tensor.copy_(states[key])
    resumed.steps, resumed.seed = replica.steps, replica.seed
    for ids in data[20:]:
        assert replica.step(ids, 1e-2) == resumed.step(ids, 1e-2)
    assert same(replica, resumed)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("fp32-adamw", 1e-6),
        ("fp32-adamw-ckpt", 1e-6),
        ("fp32-offload-adamw", 1e-6),
        ("amp-adamw", 1e-2),
        ("bf16-adamw", 2e-2),
        ("bf16-offload-adamw", 2e-2),
    ],
)
def test_gradients_summed_over_batches_are_those_of_one_batch_with_all_their_sequences(
    name: str, tolerance: float
) -> None:
    # AdamW's first moment after one step is a tenth of the gradient, clipping included.
    inner = InnerSpec(clip_norm=0.05)  # so that it is the sum that is clipped
    ids = torch.cat(batches(4))[:7]  # the last batch is smaller
    whole, summed = made(name, inner=inner), made(name, inner=inner)
    losses = whole.step(ids, 1e-3), summed.step(torch.split(ids, 2), 1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=max(tolerance, 1e-6))
    assert (whole.steps, summed.steps) == (1, 1)
    assert all(parameter.grad is None for parameter in summed.model.parameters())
    moments = [
        torch.cat([t.float().reshape(-1) for key, t in one.state() if key.startswith(f"{FIRST}:")])
        for one in (whole, summed)
    ]
    assert torch.linalg.vector_norm(moments[0]) == pytest.approx(0.05 * 0.1, rel=0.02)
    away = torch.linalg.vector_norm(moments[0] - moments[1])
    assert away <= tolerance * torch.linalg.vector_norm(moments[0])


def test_with_fp32_on_the_device_summing_on_the_host_is_summing_on_the_device_to_the_bit() -> None:
    kept, offloaded = made("fp32-adamw-ckpt"), made("fp32-offload-adamw")
    data = batches(6)
    for start in (0, 3):
        group = data[start : start + 3]
        assert kept.step(group, 1e-3) == offloaded.step(group, 1e-3)
    assert same(kept, offloaded)


def test_a_recipe_that_frees_gradients_in_the_backward_pass_refuses_to_sum_them() -> None:
    replica = made("fp32-backward-adamw")
    with pytest.raises(ValueError, match="cannot accumulate"):
        replica.step(batches(2), 1e-3)
    assert replica.step(batches(1), 1e-3) > 5


@pytest.mark.parametrize("name", FULL)
def test_the_pseudo_gradient_holds_what_training_changed_and_the_codec_takes_it(name: str) -> None:
    published = dict(made("fp32-adamw", seed=6).weights())
    replica = made(name)
    replica.load_weights(published.__getitem__)
    for key, tensor in replica.weights():
        # Nothing has been trained, so nothing may be sent, whatever loading rounded away.
        assert torch.equal(replica.as_loaded(published[key]), tensor)
    replica.step(batches(1)[0], 3e-3)
    changed = 0
    for key, tensor in replica.weights():
        delta = replica.as_loaded(published[key]).float() - tensor.float()
        sent, kept = encode_with_feedback(delta, None, CodecSpec(chunk=256, keep=16), 0.95)
        assert sent.numel == delta.numel()
        assert kept.abs().max() <= delta.abs().max()
        changed += int(delta.count_nonzero())
    assert changed > 0


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("fp32-adamw-ckpt", INNER),
        ("fp32-offload-adamw", INNER),
        ("fp32-backward-adamw", InnerSpec(learning_rate=3e-3, clip_norm=0.0)),
    ],
)
def test_what_only_moves_work_elsewhere_changes_no_bit_but_the_loss_s_last(
    name: str, inner: InnerSpec
) -> None:
    # The chunked loss sums in another order; with the ordinary one the recipes are bit-identical.
    recipe = dataclasses.replace(recipes.get(name), loss="plain")
    one = made("fp32-adamw", inner=inner)
    other = new_replica(CONFIG, recipe, inner, seed=5, device="cpu")
    for ids in batches(5):
        assert one.step(ids, 3e-3) == other.step(ids, 3e-3)
    assert same(one, other)


@pytest.mark.parametrize("name", FULL)
def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_gradient(name: str) -> None:
    replica = made(name)
    with torch.no_grad():
        next(replica.model.parameters()).fill_(torch.inf)
    with pytest.raises(TalkootError) as raised:
        replica.step(batches(1)[0], 3e-3)
    assert raised.value.code == "non-finite-loss"
    assert replica.steps == 0
    assert all(parameter.grad is None for parameter in replica.model.parameters())


def test_a_kept_gradient_is_clipped_by_the_norm_of_all_and_a_freed_one_by_its_own() -> None:
    inner = InnerSpec(clip_norm=0.01, weight_decay=0.0)
    moved = {}
    for name in ("fp32-adamw", "fp32-backward-adamw"):
        replica = made(name, inner=inner)
        replica.step(batches(1)[0], 1e-3)
        # The first moment after one step is a tenth of the clipped gradient.
        firsts = [t * 10 for key, t in replica.state() if key.startswith("exp_avg:")]
        moved[name] = [float(first.norm()) for first in firsts]
    assert np.linalg.norm(moved["fp32-adamw"]) == pytest.approx(0.01, rel=1e-3)
    assert max(moved["fp32-backward-adamw"]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", FULL)
def test_two_steps_run_on_fake_tensors_and_host_memory_is_told_apart(name: str) -> None:
    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts the bytes of new storages by tier; numbers are answered with a constant."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.seen: set[int] = set()
            self.bytes = {"device": 0, "host": 0}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    if id(storage) not in self.seen:
                        self.seen.add(id(storage))
                        self.bytes[tier()] += storage.nbytes()
            return out

    watch = Watch()
    with FakeTensorMode(), watch:
        replica = made(name, seed=None)
        for _ in range(2):
            replica.step(torch.zeros((2, 32), dtype=torch.int64), 3e-3)
    on_the_host = recipes.get(name).states_on == "host"
    parameters = sum(tensor.numel() for _, tensor in replica.weights())
    assert watch.bytes["device"] > parameters * 2
    assert (watch.bytes["host"] >= parameters * 12) == on_the_host
    assert tier() == "device"
    with on_host():
        assert tier() == "host"


def test_stochastic_rounding_follows_its_seed_and_differs_between_steps_and_tensors() -> None:
    runs = []
    for seed in (1, 1, 2):
        replica = made("bf16-adamw")
        replica.seed = seed
        for ids in batches(2):
            replica.step(ids, 1e-3)
        runs.append(replica)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_released_memory_is_gone() -> None:
    for name in FULL:
        replica = made(name)
        replica.step(batches(1)[0], 1e-3)
        tensors = [weakref.ref(tensor) for _, tensor in [*replica.weights(), *replica.state()]]
        replica.release()
        assert all(tensor() is None for tensor in tensors)
        assert all(parameter.is_meta for parameter in replica.model.parameters())
