"""A restored coordinator: its generation goes up, and its old leases end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from talkoot.server.coordinator import Coordinator
from talkoot.server.generation import bump_generation

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any

NOW = 1_800_000_000.0


def test_a_restored_state_has_a_higher_generation_each_time_and_none_of_its_old_leases(
    site: Site,
) -> None:
    node = site.add_node("anna")
    site.book.open_round(site.online(), 1.0, now=NOW)
    lease_id = site.task(node).lease.lease_id
    assert site.coordinator.generation == 0
    site.coordinator.close()

    first = bump_generation(site.coordinator.state, now=NOW)
    second = bump_generation(site.coordinator.state, now=NOW)
    assert 0 < first < second

    site.coordinator = Coordinator.open(site.coordinator.state.root)
    site.__post_init__()
    assert site.coordinator.generation == second
    assert site.lease(lease_id).state == "released"
    assert site.desk.task(node) is None
    decision = site.book.decide(site.online(), NOW + 1)
    assert decision is not None
    assert decision.action == "reopen"
