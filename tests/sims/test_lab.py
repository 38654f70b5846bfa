"""The lab is the network: same code, same bits, and it goes on where it was killed."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from talkoot.protocol.corpus import Tokens
from talkoot.protocol.errors import ConfigError, ProtocolError
from talkoot.protocol.weights import WeightsReader
from talkoot.server.config import Config, parse_config
from talkoot.sims.lab.baseline import Baseline
from talkoot.sims.lab.behaviour import (
    NodeBehaviour,
    NodeProfile,
    Situation,
    uniform,
    with_behaviour,
)
from talkoot.sims.lab.network import Lab, Submission
from talkoot.sims.lab.world import World, make_corpus, make_world

STEPS = 3  # inner steps a round
TOKENS = 2 * 32 * STEPS


def config(more: str = "", seed: int = 1) -> Config:
    text = Path(sysconfig.get_paths()["stdlib"])
    return parse_config(f"""
[run]
seed = {seed}
[model]
preset = "nano"
sequence_length = 32
micro_batch = 2
[corpus]
sources = ["{text / "argparse.py"}", "{text / "ast.py"}"]
block_tokens = 64
heldout_fraction = 0.2
[round]
tokens_per_node = {TOKENS}
{more}
""")


DENSE = '[uplink]\nkind = "dense"\n[downlink]\nkind = "dense"'


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(config(), tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def world(corpus: Path) -> World:
    return make_world(config(), [corpus], heldout_tokens=512)


def weights(lab: Lab) -> dict[str, Tensor]:
    reader = WeightsReader(lab.version.published, lab.world.manifest)
    return {spec.name: reader.get(spec.name) for spec in lab.world.manifest.tensors}


def test_all_replicas_follow_the_published_version_and_all_tokens_count_once(
    world: World, tmp_path: Path
) -> None:
    lab = Lab(world, uniform(3), tmp_path)
    first = lab.run_round()
    second = lab.run_round()
    assert lab.tokens == first.tokens + second.tokens == 2 * 3 * TOKENS
    # Nodes take up a version when they train from it.
    assert lab.replicas() == [first.result.weights_digest] * 3
    assert {s.steps for s in second.accepted} == {STEPS}
    blocks = [ref for r in (first, second) for s in r.accepted for ref in s.lease.blocks]
    assert len(set(blocks)) == len(blocks)
    assert 0.1 < first.bits_up < 1 < 32


def test_a_lab_that_was_killed_at_any_point_of_a_round_ends_with_the_same_bits(
    world: World, tmp_path: Path
) -> None:
    through = Lab(world, uniform(2), tmp_path / "through")
    want = [through.run_round().result.weights_digest for _ in range(3)]

    lab = Lab(world, uniform(2), tmp_path / "killed")
    assert lab.run_round().result.weights_digest == want[0]

    def dies(submissions: object) -> tuple[Submission, ...]:
        raise KeyboardInterrupt

    half_way = Lab(world, uniform(2), tmp_path / "killed", screen=dies)
    with pytest.raises(KeyboardInterrupt):
        half_way.run_round()
    again = Lab(world, uniform(2), tmp_path / "killed")
    assert [again.run_round().result.weights_digest for _ in range(2)] == want[1:]


def test_a_network_of_one_node_that_sends_everything_learns_what_the_node_learns_alone(
    corpus: Path, tmp_path: Path
) -> None:
    dense = make_world(config(DENSE), [corpus], heldout_tokens=512)
    lab = Lab(dense, uniform(1), tmp_path / "lab")
    alone = Baseline(dense, 1, "one", tmp_path / "one")
    for _ in range(2):
        lab.run_round()
        alone.run_round()
    assert lab.heldout_loss() == pytest.approx(alone.heldout_loss(), abs=2e-4)


def test_a_baseline_that_was_saved_goes_on_with_the_same_bits(world: World, tmp_path: Path) -> None:
    through = Baseline(world, 2, "ddp", tmp_path / "through")
    losses = [through.run_round() for _ in range(3)]
    first = Baseline(world, 2, "ddp", tmp_path / "saved")
    first.run_round()
    first.save()
    second = Baseline(world, 2, "ddp", tmp_path / "saved")
    assert [second.run_round() for _ in range(2)] == losses[1:]
    assert second.heldout_loss() == through.heldout_loss()


def test_faster_nodes_get_more_tokens_and_the_absent_catch_up(world: World, tmp_path: Path) -> None:
    nodes = (NodeProfile(), NodeProfile(speed=3), NodeProfile(dropout=0.5))
    lab = Lab(world, nodes, tmp_path)
    rounds = [lab.run_round() for _ in range(3)]
    missed = [r for r in rounds if all(s.node != 2 for s in r.accepted)]
    assert missed
    for done in rounds:
        tokens = {s.node: s.lease.tokens for s in done.accepted}
        assert tokens.get(1, 0) > tokens.get(0, 0)
    while 2 not in lab.present(lab.round + 1):
        lab.run_round()
    lab.run_round()
    assert lab.replicas()[2] == lab.replicas()[0]


def test_what_came_late_is_refused_and_returns_into_the_error_feedback(
    world: World, tmp_path: Path
) -> None:
    class Late(NodeBehaviour):
        late = True

    lab = Lab(world, with_behaviour(uniform(2), Late(), 1), tmp_path)
    done = lab.run_round()
    assert [s.node for s in done.accepted] == [0]
    assert [s.node for s in done.refused] == [1]
    assert done.tokens == lab.tokens == TOKENS
    # The blocks of the late lease are leased again.
    again = lab.run_round()
    late = set(done.refused[0].lease.blocks)
    assert late & {ref for s in (*again.accepted, *again.refused) for ref in s.lease.blocks}


class Hostile(NodeBehaviour):
    """Acts in all three places, and remembers what it saw."""

    honest = False

    def __init__(self) -> None:
        self.saw: set[str] = set()
        self.others = 0

    def tokens(self, situation: Situation, block: Tokens) -> Tokens:
        self.saw.add("tokens")
        self.others = len(situation.honest)
        block[:] = 7
        return block

    def pseudo_gradient(self, situation: Situation, name: str, delta: Tensor) -> Tensor:
        self.saw.add(name)
        return torch.zeros_like(delta)

    def payload(self, situation: Situation, path: Path) -> None:
        self.saw.add("payload")


def test_a_hostile_node_acts_in_three_places_and_sees_what_honest_nodes_made(
    world: World, tmp_path: Path
) -> None:
    hostile = Hostile()
    lab = Lab(world, with_behaviour(uniform(3), hostile, 1), tmp_path)
    done = lab.run_round()
    assert hostile.saw == {spec.name for spec in world.manifest.tensors} | {"tokens", "payload"}
    assert hostile.others == 2
    assert [s.facts.l2_norm for s in done.accepted if s.node == 2] == [0.0]
    assert all(s.facts.l2_norm > 0 for s in done.accepted if s.node != 2)


def test_a_payload_that_was_spoiled_is_found_by_the_coordinator_s_own_check(
    world: World, tmp_path: Path
) -> None:
    class Vandal(NodeBehaviour):
        honest = False

        def payload(self, situation: Situation, path: Path) -> None:
            path.write_bytes(path.read_bytes()[:-3])

    lab = Lab(world, with_behaviour(uniform(2), Vandal(), 1), tmp_path)
    with pytest.raises(ProtocolError):
        lab.run_round()


def test_nodes_with_text_of_their_own_are_leased_that_and_nothing_else(
    corpus: Path, tmp_path: Path
) -> None:
    text = Path(sysconfig.get_paths()["stdlib"])
    other = make_corpus(config(), tmp_path, [str(text / "typing.py"), str(text / "inspect.py")])
    world = make_world(config(), [corpus, other], heldout_tokens=512)
    assert len(world.heldout) == 16
    lab = Lab(world, (NodeProfile(), NodeProfile(shard=1)), tmp_path / "lab")
    done = lab.run_round()
    first, second = done.accepted
    assert world.spec(0).corpus != world.spec(1).corpus
    assert first.lease.tokens == second.lease.tokens
    with pytest.raises(ConfigError, match="shard"):
        Lab(world, (NodeProfile(shard=2),), tmp_path / "none")
    shutil.rmtree(tmp_path)


def test_nodes_with_different_recipes_train_in_one_network(world: World, tmp_path: Path) -> None:
    names = (
        "fp32-adamw",
        "bf16-adamw",
        "bf16-backward-adamw8",
        "bf16-backward-adafactor",
        "bf16-offload-adamw",
    )
    lab = Lab(world, tuple(NodeProfile(recipe=name) for name in names), tmp_path)
    before = lab.heldout_loss()
    rounds = [lab.run_round() for _ in range(4)]
    assert all(len(done.accepted) == len(names) for done in rounds)
    assert lab.heldout_loss() < before - 0.2
    assert set(lab.replicas()) == {rounds[-2].result.weights_digest}  # what the last began from
