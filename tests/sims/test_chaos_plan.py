"""Who dies when: by the seed alone, and everybody in turn."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from talkoot.protocol.faults import PLACES
from talkoot.sims.chaos.plan import COMPONENTS, VOLUNTEER, component_at, strikes


@given(seed=st.integers(0, 2**32), nodes=st.integers(1, 8))
def test_a_seed_gives_the_same_strikes_again(seed: int, nodes: int) -> None:
    first = list(itertools.islice(strikes(seed, nodes), 40))
    assert first == list(itertools.islice(strikes(seed, nodes), 40))
    for strike in first:
        for kill in strike.kills:
            assert kill.component in COMPONENTS
            assert (kill.node is not None) == (kill.component in VOLUNTEER and kill.place is None)
            assert kill.node is None or 0 <= kill.node < nodes


@given(seed=st.integers(0, 2**32))
def test_every_component_and_every_place_has_its_turn_before_one_comes_again(seed: int) -> None:
    places: Counter[str] = Counter()
    components: Counter[str] = Counter()
    for strike in itertools.islice(strikes(seed, 3), 400):
        for kill in strike.kills:
            if kill.place is not None:
                places[kill.place] += 1
            else:
                components[kill.component] += 1
    assert set(places) == PLACES
    assert max(places.values()) - min(places.values()) <= 1
    assert set(components) == set(COMPONENTS)


def test_each_place_belongs_to_a_component() -> None:
    assert {component_at(place) for place in PLACES} == {
        "round loop",
        "transfer",
        "daemon",
        "trainer",
    }
