"""Closing a round: against a naive dense reference, torch's own SGD, and a crash."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.loops import both_loops  # noqa: F401

from talkoot.protocol import codec_bits
from talkoot.protocol.codec import SparseTensor, encode_tensor, encode_with_feedback
from talkoot.protocol.errors import ProtocolError, StateError
from talkoot.protocol.manifest import Manifest, manifest_of, weights_digest
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.payload import PayloadReader, verify_payload, write_payload
from talkoot.protocol.weights import WeightsReader, apply_update
from talkoot.server.aggregate import (
    AggregateResult,
    ContributionInput,
    VersionDir,
    aggregate_round,
    average,
    clip_factors,
    fair_norms,
    initial_state,
)
from talkoot.server.averaging import AT_ONCE, BLOCK_ELEMENTS
from talkoot.server.outer import OuterSpec, outer_step
from talkoot.server.robust import AggregationSpec

torch.set_num_threads(1)

TOPK = CodecSpec(chunk=128, keep=16, value_bits=4)
DENSE = CodecSpec(kind="dense")
SGD = OuterSpec(feedback_decay=1.0)
NESTEROV = OuterSpec(optimizer="nesterov", learning_rate=0.7, momentum=0.9, feedback_decay=1.0)
Weights = dict[str, torch.Tensor]


def model() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(50, 20, generator=generator),
        "norm": torch.ones(20).bfloat16(),
        "head": torch.randn(20, 30, generator=generator).bfloat16(),
    }


def gradient(seed: int, scale: float = 0.01) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(value.shape, generator=generator)
        for name, value in model().items()
    }


def contribute(
    path: Path, manifest: Manifest, spec: CodecSpec, delta: Weights, tokens: int
) -> ContributionInput:
    items = ((name, encode_tensor(value, spec)) for name, value in delta.items())
    write_payload(path, manifest, spec, items, {})
    return ContributionInput(path, tokens, verify_payload(path, manifest, spec).l2_norm, path.name)


def start(path: Path) -> tuple[Manifest, VersionDir]:
    weights = model()
    manifest = manifest_of(weights.items())
    digest = initial_state(manifest, weights.__getitem__, path / "v0")
    assert digest == weights_digest(manifest, weights.__getitem__)
    return manifest, VersionDir(path / "v0")


def master_of(state: VersionDir) -> Weights:
    """The master weights, which nobody holds as such."""
    published = load_file(state.published)
    if state.feedback is None:
        return {name: value.float() for name, value in published.items()}
    feedback = load_file(state.feedback)
    return {name: value.float() + feedback[name] for name, value in published.items()}


def naive_average(
    manifest: Manifest, spec: CodecSpec, contributions: list[ContributionInput]
) -> Weights:
    """All in float64 and dense: every contribution's values, and who sent what."""
    norms = {part.key: part.l2_norm / part.tokens**0.5 for part in contributions}
    median = sorted(norms.values())[(len(norms) - 1) // 2]
    result = {}
    for tensor in manifest.tensors:
        total = torch.zeros(tensor.numel, dtype=torch.float64)
        weight = torch.zeros(tensor.numel, dtype=torch.float64)
        for part in contributions:
            sent = PayloadReader(part.path, manifest, spec).decode(tensor.name)
            factor = min(1.0, median / norms[part.key])
            for index, value in zip(sent.indices.tolist(), sent.values.tolist(), strict=True):
                total[index] += part.tokens * factor * value
                weight[index] += part.tokens
        result[tensor.name] = (total / weight.clamp(min=1)).reshape(tensor.shape)
    return result


@pytest.mark.parametrize("uplink", [TOPK, DENSE], ids=["topk", "dense"])
def test_a_round_equals_the_naive_dense_reference(tmp_path: Path, uplink: CodecSpec) -> None:
    manifest, state = start(tmp_path)
    contributions = [
        contribute(tmp_path / f"c{n}", manifest, uplink, gradient(n, scale), tokens)
        for n, (scale, tokens) in enumerate([(0.01, 1000), (0.02, 500), (1.0, 3000), (0.005, 1)])
    ]
    result = aggregate_round(manifest, state, contributions, uplink, TOPK, SGD, tmp_path / "v1")
    expected = naive_average(manifest, uplink, contributions)
    old, new = master_of(state), master_of(result.state)
    for name, value in expected.items():
        torch.testing.assert_close(new[name], (old[name] - value).float(), rtol=1e-6, atol=1e-6)
    squares = sum(float(value.square().sum()) for value in expected.values())
    assert result.gradient_norm == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_of_what_an_update_leaves_out_the_decay_is_kept_and_the_rounding_of_the_rest_whole(
    tmp_path: Path,
) -> None:
    manifest, state = start(tmp_path)
    part = contribute(tmp_path / "c", manifest, DENSE, gradient(1, 1.0), 1)
    kept, decayed = (
        aggregate_round(
            *(manifest, state, [part], DENSE, TOPK),
            OuterSpec(learning_rate=SGD.learning_rate, feedback_decay=decay),
            tmp_path / f"decay{decay}",
        )
        for decay in (1.0, 0.25)
    )
    assert kept.update_digest == decayed.update_digest
    whole, less = load_file(kept.state.feedback_path), load_file(decayed.state.feedback_path)
    reader = PayloadReader(kept.update_path, manifest, TOPK)
    for tensor in manifest.tensors:
        sent = reader.decode(tensor.name).indices
        expected = 0.25 * whole[tensor.name].flatten()
        expected[sent] = whole[tensor.name].flatten()[sent]
        assert 0 < len(sent) < tensor.numel
        assert torch.equal(less[tensor.name].flatten(), expected)


def test_every_node_that_applies_the_update_has_the_published_weights(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    node = state.published
    for version in range(1, 5):
        parts = [
            contribute(tmp_path / f"c{version}.{n}", manifest, TOPK, gradient(10 * version + n), 9)
            for n in range(3)
        ]
        result = aggregate_round(
            manifest, state, parts, TOPK, TOPK, NESTEROV, tmp_path / f"v{version}"
        )
        after = tmp_path / f"node{version}"
        digest = apply_update(manifest, node, result.update_path, TOPK, after)
        assert digest == result.weights_digest
        assert after.read_bytes() == result.state.published.read_bytes()
        raw = result.update_path.read_bytes()
        assert result.update_digest == hashlib.sha256(raw).hexdigest()
        assert result.update_size_bytes == len(raw)
        facts = verify_payload(result.update_path, manifest, TOPK)
        assert facts.l2_norm == pytest.approx(result.update_norm)
        assert facts.bits_per_parameter == result.bits_per_parameter
        state, node = result.state, after


def test_what_the_update_leaves_out_is_published_later(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    nothing = {name: torch.zeros(value.shape) for name, value in model().items()}
    parts = [contribute(tmp_path / "first", manifest, DENSE, gradient(1, 1.0), 1)]
    idle = [contribute(tmp_path / "idle", manifest, DENSE, nothing, 1)]
    distances = []
    for version in range(1, 40):
        state = aggregate_round(
            manifest, state, parts, DENSE, TOPK, SGD, tmp_path / f"v{version}"
        ).state
        gap = [value.norm() for value in load_file(state.feedback_path).values()]
        distances.append(float(torch.stack(gap).norm()))
        parts = idle
    assert distances[0] > 10
    # Down to what bf16 itself cannot hold: two of the three tensors are published in it.
    assert distances[-1] < 0.01 * distances[0]


def test_one_contributor_with_dense_codecs_and_rate_1_gives_its_own_weights(
    tmp_path: Path,
) -> None:
    weights = {"w": torch.randn(100, generator=torch.Generator().manual_seed(1))}
    manifest = manifest_of(weights.items())
    initial_state(manifest, weights.__getitem__, tmp_path / "v0")
    local = weights["w"] * 1.5  # within a factor of two the difference is exact (Sterbenz)
    encoded, _ = encode_with_feedback(weights["w"] - local, None, DENSE, 0.95)
    write_payload(tmp_path / "c", manifest, DENSE, [("w", encoded)], {})
    part = ContributionInput(tmp_path / "c", 12345, 1.0, "c")
    result = aggregate_round(
        manifest, VersionDir(tmp_path / "v0"), [part], DENSE, DENSE, SGD, tmp_path / "v1"
    )
    assert torch.equal(load_file(result.state.published)["w"], local)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rate", [1.0, 0.7])
def test_nesterov_is_torchs_own_to_the_bit(rate: float, momentum: float) -> None:
    spec = OuterSpec(optimizer="nesterov", learning_rate=rate, momentum=momentum)
    generator = torch.Generator().manual_seed(2)
    ours = torch.randn(37, 11, generator=generator)
    theirs = torch.nn.Parameter(ours.clone())
    buffer = None
    torchs = torch.optim.SGD(
        [theirs], lr=rate, momentum=momentum, nesterov=momentum > 0, foreach=False
    )
    for _ in range(6):
        grad = torch.randn(37, 11, generator=generator)
        ours, buffer = outer_step(spec, ours, grad, buffer)
        theirs.grad = grad.clone()
        torchs.step()
        assert torch.equal(ours, theirs.detach())


def test_nesterov_over_rounds_is_torchs_own_fed_with_the_averages(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    parameters = {name: torch.nn.Parameter(value.float()) for name, value in model().items()}
    torchs = torch.optim.SGD(parameters.values(), lr=0.7, momentum=0.9, nesterov=True)
    for version in range(1, 4):
        part = contribute(tmp_path / f"c{version}", manifest, DENSE, gradient(version), 7)
        result = aggregate_round(
            manifest, state, [part], DENSE, TOPK, NESTEROV, tmp_path / f"v{version}"
        )
        for name, value in gradient(version).items():
            parameters[name].grad = value
        torchs.step()
        state = result.state
        for name, value in master_of(state).items():
            torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-6, atol=1e-6)
        assert state.outer is not None


def test_plain_sgd_keeps_no_momentum_file(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    part = contribute(tmp_path / "c", manifest, TOPK, gradient(1), 7)
    result = aggregate_round(manifest, state, [part], TOPK, TOPK, SGD, tmp_path / "v1")
    assert result.state.outer is None
    assert set(result.seconds) == {"read", "decode", "outer", "encode", "write", "hash"}


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_round_gives_the_same_bytes_again_in_any_order_of_arrival(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    parts = [
        contribute(tmp_path / f"c{n}", manifest, TOPK, gradient(n, 0.01 * (n + 1)), 3 + n)
        for n in range(3)
    ]
    before = snapshot(state.path)
    made = []
    for number, order in enumerate(itertools.permutations(parts)):
        out = tmp_path / f"try{number}"
        aggregate_round(manifest, state, order, TOPK, TOPK, NESTEROV, out)
        made.append(snapshot(out))
    assert all(files == made[0] for files in made)
    assert snapshot(state.path) == before


class Died(BaseException):
    """The process ends here, as far as the code can tell."""


@pytest.mark.parametrize("reading", [1, 3, 6, 11])
def test_a_round_that_dies_half_way_leaves_no_version_and_runs_again_to_the_same_bytes(
    tmp_path: Path, reading: int
) -> None:
    manifest, state = start(tmp_path)
    parts = [contribute(tmp_path / f"c{n}", manifest, TOPK, gradient(n), 3) for n in range(2)]
    whole = aggregate_round(manifest, state, parts, TOPK, TOPK, NESTEROV, tmp_path / "whole")
    before = snapshot(state.path)
    ticks = itertools.count(1)

    def clock() -> float:
        if next(ticks) == reading:
            raise Died
        return 0.0

    out = tmp_path / "v1"
    with pytest.raises(Died):
        aggregate_round(manifest, state, parts, TOPK, TOPK, NESTEROV, out, clock=clock)
    assert not out.exists()
    # A process that was killed outright could not even clean up after itself.
    (tmp_path / ".v1.partial").mkdir()
    (tmp_path / ".v1.partial" / "feedback.safetensors").write_bytes(b"half")
    again = aggregate_round(manifest, state, parts, TOPK, TOPK, NESTEROV, out)
    assert again.weights_digest == whole.weights_digest
    assert snapshot(out) == snapshot(whole.state.path)
    assert snapshot(state.path) == before
    assert not (tmp_path / ".v1.partial").exists()


@pytest.mark.parametrize("chunk", [128, 100], ids=["aligned", "odd chunk"])
def test_sections_by_any_number_of_threads_give_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """And the numbers of whole tensors: sections of another size round nothing differently."""
    uplink = CodecSpec(chunk=chunk, keep=16, value_bits=4)
    manifest, state = start(tmp_path)
    made = []
    for number, (section, workers) in enumerate([(256, 1), (256, 3), (2**20, 2)]):
        monkeypatch.setattr(codec_bits, "SECTION", section)
        parts = [
            contribute(tmp_path / f"c{number}.{n}", manifest, uplink, gradient(n), 3 + n)
            for n in range(3)
        ]
        before = state
        for version in range(2):
            out = tmp_path / f"try{number}.{version}"
            before = aggregate_round(
                manifest, before, parts, uplink, DENSE, NESTEROV, out, workers=workers
            ).state
        made.append(before)
    assert snapshot(made[0].path) == snapshot(made[1].path)
    for name, value in master_of(made[0]).items():
        # One table a section: values differ by their coding, not by where sections end.
        torch.testing.assert_close(value, master_of(made[2])[name], rtol=0, atol=0.02)


@pytest.mark.parametrize("rule", ["trimmed-mean", "sign-majority"])
def test_the_other_rules_run_over_sections_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    manifest, state = start(tmp_path)
    parts = [contribute(tmp_path / f"c{n}", manifest, DENSE, gradient(n), 3) for n in range(4)]
    spec = AggregationSpec.model_validate({"rule": rule})
    made = []
    for section in (2**20, 64):
        monkeypatch.setattr(codec_bits, "SECTION", section)
        out = tmp_path / f"v{section}"
        aggregate_round(manifest, state, parts, DENSE, DENSE, SGD, out, rule=spec, workers=2)
        made.append(snapshot(out))
    assert made[0] == made[1]


def test_a_version_that_lost_its_feedback_is_not_gone_on_from(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    part = contribute(tmp_path / "c", manifest, TOPK, gradient(1), 7)
    state = aggregate_round(manifest, state, [part], TOPK, TOPK, SGD, tmp_path / "v1").state
    state.feedback_path.unlink()
    with pytest.raises(StateError, match=r"feedback\.safetensors"):
        aggregate_round(manifest, state, [part], TOPK, TOPK, SGD, tmp_path / "v2")


def test_a_version_directory_that_exists_is_replaced_by_the_same_bytes(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    parts = [contribute(tmp_path / "c", manifest, TOPK, gradient(1), 3)]

    def run() -> AggregateResult:
        return aggregate_round(manifest, state, parts, TOPK, TOPK, SGD, tmp_path / "v1")

    first = snapshot(run().state.path)
    assert snapshot(run().state.path) == first


def test_a_malformed_contribution_stops_the_round_and_leaves_nothing(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    parts = [contribute(tmp_path / f"c{n}", manifest, TOPK, gradient(n), 3) for n in range(2)]
    raw = bytearray(parts[1].path.read_bytes())
    raw[-60:] = b"\xff" * 60
    parts[1].path.write_bytes(raw)
    with pytest.raises(ProtocolError):
        aggregate_round(manifest, state, parts, TOPK, TOPK, SGD, tmp_path / "v1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c1", "v0"]


def test_an_outer_step_that_overflows_is_not_published(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    part = contribute(tmp_path / "c", manifest, DENSE, gradient(1, 1e15), 3)
    mad = OuterSpec.model_construct(optimizer="sgd", learning_rate=1e30, momentum=0.0)
    with pytest.raises(ProtocolError, match="outer step") as caught:
        aggregate_round(manifest, state, [part], DENSE, DENSE, mad, tmp_path / "v1")
    assert caught.value.code == "not-finite"
    assert not (tmp_path / "v1").exists()


def test_arguments_that_make_no_round_are_refused(tmp_path: Path) -> None:
    manifest, state = start(tmp_path)
    part = contribute(tmp_path / "c", manifest, TOPK, gradient(1), 3)
    for parts, out in (([], "v1"), ([part, part], "v1"), ([part], "v0")):
        with pytest.raises(ValueError, match=r"contribution|directory"):
            aggregate_round(manifest, state, parts, TOPK, TOPK, SGD, tmp_path / out)
    assert WeightsReader(state.published, manifest).weights_digest()


NORMS = st.lists(st.floats(0, 1e6), min_size=1, max_size=9)


@given(NORMS)
def test_after_clipping_nobody_is_louder_than_the_median_contributor(norms: list[float]) -> None:
    median = sorted(norms)[(len(norms) - 1) // 2]
    for norm, factor in zip(norms, clip_factors(norms), strict=True):
        assert 0 <= factor <= 1
        assert norm * factor <= median * (1 + 1e-9) + 1e-300  # subnormal numbers are coarse
        assert factor == 1 or norm > median


def test_who_was_given_more_tokens_may_be_as_much_louder_as_their_root() -> None:
    norms, tokens = [1.0, 2.0, 2.0, 9.0], [1, 4, 4, 4]
    assert clip_factors(norms) == [1.0, 1.0, 1.0, pytest.approx(2 / 9)]
    assert fair_norms(norms, tokens) == [2.0, 2.0, 2.0, 9.0]
    assert fair_norms(norms, [7] * 4) == norms
    lone = clip_factors(fair_norms([1.0, 3.0, 4.0, 4.0], tokens))  # the shortest sets no measure
    assert lone == [1.0, 1.0, 3 / 4, 3 / 4]


def test_a_coordinate_is_averaged_over_those_who_sent_it() -> None:
    parts = [
        (SparseTensor(torch.tensor([0, 2]), torch.tensor([4.0, 8.0])), 1.0, 1.0),
        (SparseTensor(torch.tensor([2, 3]), torch.tensor([8.0, 2.0])), 0.25, 0.5),
    ]
    expected = torch.tensor([4.0, 0.0, (8 + 1) / 1.25, 1.0, 0.0])
    assert torch.equal(average(5, parts), expected)


@pytest.mark.parametrize("senders", [3, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE + 5])
def test_blocks_and_groups_of_contributors_change_no_bit_of_the_mean(senders: int) -> None:
    numel = 2 * BLOCK_ELEMENTS + 77
    total, weights = np.zeros((2, numel), dtype=np.float32)
    parts = []
    for node in range(senders):
        generator = torch.Generator().manual_seed(node)
        indices = torch.randperm(numel, generator=generator)[:2000].sort().values
        values = torch.randn(indices.numel(), generator=generator)
        weight, factor = 1 / (node + 1), 1 - node / 100
        parts.append((SparseTensor(indices, values), weight, factor))
        total[indices.numpy()] += values.numpy() * np.float32(weight * factor)
        weights[indices.numpy()] += np.float32(weight)
    expected = total / np.where(weights > 0, weights, np.float32(1))
    assert average(numel, parts).numpy().tobytes() == expected.tobytes()
