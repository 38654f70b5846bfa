"""Leases under churn: nothing counted twice, nothing lost, the same on every side."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from talkoot.protocol import limits
from talkoot.protocol.errors import CorpusError, StateError
from talkoot.protocol.leases import (
    CommittedBlocks,
    Member,
    block_order,
    lease_id,
    plan_leases,
    tokens_wanted,
)
from talkoot.protocol.messages import BlockRef, Lease, canonical_bytes, parse

BLOCK_TOKENS = 100

# Checked once against the same arithmetic in plain Python integers.
FROZEN_SMALL = [10, 9, 8, 2, 7, 4, 3, 6, 1, 0, 11, 5]
FROZEN_LARGE = "e677af67090a73e6b30c98a477029863b142af124355991d07e090d35bfe20f6"


def node(number: int) -> str:
    return f"{number:016x}"


def plan(
    committed: CommittedBlocks, members: list[Member], *, seed: int = 7, round: int = 1
) -> tuple[Lease, ...]:
    return plan_leases(
        seed=seed,
        run_id="run",
        round=round,
        attempt=0,
        block_tokens=BLOCK_TOKENS,
        committed=committed,
        members=members,
    )


def pairs(leases: tuple[Lease, ...]) -> list[tuple[int, int]]:
    return [(ref.epoch, ref.block) for lease in leases for ref in lease.blocks]


def refs(epoch: int, blocks: list[int]) -> list[BlockRef]:
    return [BlockRef(epoch=epoch, block=block) for block in blocks]


class Churn(RuleBasedStateMachine):
    """Nodes come and go; leases are committed, dropped, or abandoned with a whole attempt."""

    @initialize(block_count=st.integers(1, 40), seed=st.integers(0, 2**63 - 1))
    def start(self, block_count: int, seed: int) -> None:
        self.block_count = block_count
        self.seed = seed
        self.committed = CommittedBlocks(block_count)
        self.counted: Counter[tuple[int, int]] = Counter()
        self.members: dict[str, int] = {}
        self.open: list[Lease] = []
        self.stale: list[Lease] = []
        self.round = 0
        self.attempt = 0

    def draw_plan(self) -> tuple[Lease, ...]:
        def once(members: list[Member], committed: CommittedBlocks) -> tuple[Lease, ...]:
            return plan_leases(
                seed=self.seed,
                run_id="run",
                round=self.round,
                attempt=self.attempt,
                block_tokens=BLOCK_TOKENS,
                committed=committed,
                members=members,
            )

        members = [Member(name, tokens) for name, tokens in self.members.items()]
        leases = once(members, self.committed)
        restored = CommittedBlocks.from_bytes(self.committed.to_bytes())
        assert once(members[::-1], restored) == leases
        return leases

    @rule(number=st.integers(0, 8), tokens=st.integers(0, 12 * BLOCK_TOKENS))
    def join(self, number: int, tokens: int) -> None:
        self.members[node(number)] = tokens

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.members)))
        del self.members[gone]
        self.stale += [lease for lease in self.open if lease.node_id == gone]
        self.open = [lease for lease in self.open if lease.node_id != gone]

    @rule(same_round=st.booleans())
    def plan_round(self, same_round: bool) -> None:
        if same_round:
            self.attempt += 1
        else:
            self.round, self.attempt = self.round + 1, 0
        self.stale += self.open
        leases = self.draw_plan()
        assert sorted(lease.node_id for lease in leases) == sorted(self.members)
        leased = pairs(leases)
        assert len(set(leased)) == len(leased)
        assert not any(self.counted[pair] for pair in leased)
        # Oldest first: a later epoch is touched only when every earlier one is all given out.
        for epoch in range(max((e for e, _ in leased), default=0)):
            given_out = {b for e, b in leased if e == epoch}
            done = {b for e, b in self.counted if e == epoch}
            assert given_out | done == set(range(self.block_count))
        self.open = list(leases)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.open))
        self.open.remove(lease)
        self.committed.add(lease.blocks)
        self.counted.update(pairs((lease,)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.open))
        self.open.remove(lease)
        self.stale.append(lease)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def commit_again_what_others_committed(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.stale))
        if any(self.counted[pair] for pair in pairs((lease,))):
            before = self.committed.to_bytes()
            with pytest.raises(StateError):
                self.committed.add(lease.blocks)
            assert self.committed.to_bytes() == before

    @invariant()
    def each_block_counts_at_most_once_per_epoch(self) -> None:
        assert all(count == 1 for count in self.counted.values())
        assert self.committed.total == len(self.counted)
        for epoch, block in self.counted:
            assert BlockRef(epoch=epoch, block=block) in self.committed

    def teardown(self) -> None:
        """Drain: after the last abandoned lease, every block of each finished epoch is there."""
        if not hasattr(self, "committed"):
            return
        self.members = {node(99): 5 * BLOCK_TOKENS, node(98): 0}
        target = max((epoch for epoch, _ in self.counted), default=0) + 1
        while self.committed.first_open_epoch < target:
            self.round += 1
            for lease in self.draw_plan():
                self.committed.add(lease.blocks)
                self.counted.update(pairs((lease,)))
        for epoch in range(target):
            for block in range(self.block_count):
                assert self.counted[epoch, block] == 1


TestNoBlockIsLostOrCountedTwiceUnderChurn = Churn.TestCase
TestNoBlockIsLostOrCountedTwiceUnderChurn.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 3000))
@settings(max_examples=50, deadline=None)
def test_an_epochs_order_is_a_permutation_of_its_blocks(
    seed: int, epoch: int, block_count: int
) -> None:
    assert sorted(block_order(seed, epoch, block_count).tolist()) == list(range(block_count))


def test_the_order_of_an_epoch_is_frozen_for_all_time() -> None:
    assert block_order(0, 0, 12).tolist() == FROZEN_SMALL
    large = block_order(2**63 - 1, 3, 2**17).astype("<u4").tobytes()
    assert hashlib.sha256(large).hexdigest() == FROZEN_LARGE


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(block_order(seed, epoch, 64).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_a_plan_draws_in_the_epochs_order() -> None:
    committed = CommittedBlocks(1000)
    order = block_order(7, 0, 1000).tolist()
    committed.add(refs(0, order[:300]))
    leases = plan(committed, [Member(node(i), 50 * BLOCK_TOKENS) for i in range(4)])
    assert sorted(block for _, block in pairs(leases)) == sorted(order[300:500])


def test_a_plan_over_many_slices_of_a_large_corpus_draws_in_the_epochs_order() -> None:
    count = 2**21 + 12_345
    order = block_order(3, 0, count)
    committed = CommittedBlocks(count)
    committed.add(refs(0, order[:1000].tolist()))
    assert committed.next_blocks(3, 0, 500).tolist() == order[1000:1500].tolist()


def test_a_short_epoch_is_continued_by_the_next() -> None:
    leases = plan(CommittedBlocks(3), [Member(node(1), 8 * BLOCK_TOKENS)])
    assert [epoch for epoch, _ in pairs(leases)] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [(0, 1), (149, 1), (150, 2), (1000, 10), (10**9, limits.MAX_LEASE_BLOCKS)],
)
def test_a_member_gets_the_nearest_number_of_blocks_within_the_caps(
    tokens: int, blocks: int
) -> None:
    (lease,) = plan(CommittedBlocks(5000), [Member(node(1), tokens)])
    assert len(lease.blocks) == blocks
    assert lease.tokens == blocks * BLOCK_TOKENS


def test_the_largest_lease_stays_well_inside_one_control_message() -> None:
    (lease,) = plan(CommittedBlocks(2**20), [Member(node(1), 10**9)])
    assert len(canonical_bytes(lease)) < limits.MAX_CONTROL_MESSAGE // 2
    assert parse(Lease, canonical_bytes(lease)) == lease


def test_a_node_that_never_delivers_does_not_hold_the_same_blocks_for_ever() -> None:
    committed = CommittedBlocks(50)
    members = [Member(node(i), BLOCK_TOKENS) for i in range(4)]
    for round_number in range(60):
        for lease in plan(committed, members, round=round_number):
            if lease.node_id != node(0):
                committed.add(lease.blocks)
    assert committed.first_open_epoch >= 2


def test_a_lease_id_names_all_that_the_lease_promises() -> None:
    blocks = refs(0, [1, 2])
    ids = {
        lease_id("a", 1, 1, node(1), blocks),
        lease_id("b", 1, 1, node(1), blocks),
        lease_id("a", 2, 1, node(1), blocks),
        lease_id("a", 1, 2, node(1), blocks),
        lease_id("a", 1, 1, node(2), blocks),
        lease_id("a", 1, 1, node(1), blocks[::-1]),
    }
    assert len(ids) == 6
    assert all(len(name) == 32 for name in ids)


def test_the_same_node_twice_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="twice"):
        plan(CommittedBlocks(5), [Member(node(1), 1), Member(node(1), 2)])


def test_no_members_get_no_leases() -> None:
    assert plan(CommittedBlocks(5), []) == ()


def test_a_finished_epoch_costs_nothing_to_store() -> None:
    committed = CommittedBlocks(4096)
    empty = len(committed.to_bytes())
    committed.add(refs(1, list(range(4096))))  # whole, but after one that isn't
    assert committed.first_open_epoch == 0
    assert committed.remaining(1) == 0
    committed.add(refs(0, list(range(4096))))
    assert committed.first_open_epoch == 2
    assert committed.total == 8192
    assert len(committed.to_bytes()) == empty


def test_committing_is_all_or_nothing() -> None:
    committed = CommittedBlocks(10)
    committed.add(refs(0, [3]))
    before = committed.to_bytes()
    for bad in (refs(0, [1, 3]), refs(0, [1, 1]), refs(0, [1, 10])):
        with pytest.raises(StateError):
            committed.add(bad)
        assert committed.to_bytes() == before


@given(
    st.integers(1, 70),
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 69)), max_size=120),
    st.randoms(use_true_random=False),
)
def test_a_stored_set_is_read_back_and_does_not_depend_on_the_order_of_commits(
    block_count: int, chosen: set[tuple[int, int]], rng: random.Random
) -> None:
    wanted = [BlockRef(epoch=e, block=b) for e, b in sorted(chosen) if b < block_count]
    first, second = CommittedBlocks(block_count), CommittedBlocks(block_count)
    first.add(wanted)
    rng.shuffle(wanted)
    for ref in wanted:
        second.add([ref])
    assert first == second
    assert CommittedBlocks.from_bytes(first.to_bytes()) == first


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
def test_damaged_bytes_are_refused_or_are_another_valid_set(
    noise: bytes, at: int, value: int
) -> None:
    committed = CommittedBlocks(13)
    committed.add(refs(0, [1, 12]) + refs(2, list(range(13))))
    data = bytearray(committed.to_bytes())
    data[at % len(data)] = value
    for damaged in (noise, bytes(data), bytes(data) + noise[:1], bytes(data[:-1])):
        try:
            read = CommittedBlocks.from_bytes(damaged)
        except StateError:
            continue
        assert read.to_bytes() == damaged


def test_a_stored_set_with_a_bit_past_its_last_block_is_refused() -> None:
    committed = CommittedBlocks(13)
    committed.add(refs(0, [1]))
    data = bytearray(committed.to_bytes())
    data[-1] |= 1 << 5  # bit 13 of the bitmap: there are blocks 0 to 12
    with pytest.raises(StateError):
        CommittedBlocks.from_bytes(bytes(data))


@pytest.mark.parametrize("block_count", [0, -1, limits.MAX_BLOCKS + 1])
def test_an_impossible_number_of_blocks_is_refused(block_count: int) -> None:
    with pytest.raises(CorpusError):
        CommittedBlocks(block_count)
    with pytest.raises(CorpusError):
        block_order(0, 0, block_count)


def test_a_lease_follows_the_measured_speed_within_the_clamp() -> None:
    assert tokens_wanted(50.0, 50.0, 1000) == 1000
    assert tokens_wanted(100.0, 50.0, 1000) == 2000
    assert tokens_wanted(1e300, 1e-300, 1000) == 4000
    assert tokens_wanted(0.001, 50.0, 1000) == 250
    assert tokens_wanted(float("nan"), 50.0, 1000) == 250
    assert tokens_wanted(50.0, 0.0, 1000) == 1000
    assert tokens_wanted(1.0, 4.0, 1) == 1


def test_no_lease_outlasts_the_time_that_it_may_take() -> None:
    # The median would need 20 s for its 1000 tokens: everybody's lease shrinks to half.
    assert tokens_wanted(50.0, 50.0, 1000, longest_seconds=10.0) == 500
    assert tokens_wanted(100.0, 50.0, 1000, longest_seconds=10.0) == 1000
    # A node below the clamp gets what it can do, and not a quarter of the median's.
    assert tokens_wanted(1.0, 50.0, 1000, longest_seconds=100.0) == 100
    assert tokens_wanted(1.0, 50.0, 1000) == 250
    assert tokens_wanted(50.0, 50.0, 1000, longest_seconds=20.0) == 1000
