"""Who gets in: the queue of open enrolment, invites that are revoked, bans that are lifted."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select

from talkoot.protocol.errors import ConfigError, RefusedError
from talkoot.protocol.identity import NodeKey
from talkoot.server import applicants
from talkoot.server.invites import list_invites, open_invites, public_link, revoke
from talkoot.server.ledger.schema import Applicant, Node
from talkoot.server.tables_gate import applicant_rows, invite_rows

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(RefusedError) as caught:
        call()
    assert caught.value.code == code


def nodes(site: Site) -> int:
    with site.coordinator.ledger.read() as session:
        return int(session.scalar(select(func.count(Node.node_id))) or 0)


def test_without_open_enrolment_nobody_comes_in_without_an_invite(site: Site) -> None:
    key = NodeKey.generate()
    refused("invite-needed", lambda: site.registry.enrol(site.request(None, key), "192.0.2.1"))
    with pytest.raises(ConfigError, match="enrolment"):
        public_link(site.coordinator)


def test_a_stranger_waits_with_nothing_in_hand_until_the_operator_decides(site: Site) -> None:
    site.reopen(admission={"enrolment": "open"})
    assert public_link(site.coordinator).token is None
    good, bad = NodeKey.generate(), NodeKey.generate()
    for key in (good, bad, good):
        refused(
            "awaits-approval", partial(site.registry.enrol, site.request(None, key), "192.0.2.1")
        )
    assert nodes(site) == 0
    assert site.flower.nodes == {}
    waiting = applicants.waiting(site.coordinator)
    assert [a.node_id for a in waiting] == [good.node_id, bad.node_id]
    assert applicant_rows(waiting, time.time())[0]["address"] == "192.0.2.1"

    applicants.decide(site.coordinator, good.node_id, approve=True, role="validator")
    applicants.decide(site.coordinator, bad.node_id, approve=False, reason="No.")
    for _ in range(2):  # the first answer may be lost
        reply = site.registry.enrol(site.request(None, good), "192.0.2.1")
        assert reply.node_id == good.node_id
    assert site.node(good.node_id).role == "validator"
    refused(
        "application-refused", lambda: site.registry.enrol(site.request(None, bad), "192.0.2.1")
    )
    with site.coordinator.ledger.read() as session:
        assert set(session.scalars(select(Applicant.address))) == {""}


def test_the_queue_is_capped_in_all_by_address_and_by_the_hour(site: Site) -> None:
    def ask(address: str) -> None:
        site.registry.enrol(site.request(None, NodeKey.generate()), address)

    site.reopen(admission={"enrolment": "open", "queue": 3, "queue_per_address": 2})
    refused("awaits-approval", lambda: ask("2001:db8::1"))
    refused("awaits-approval", lambda: ask("2001:db8::2"))
    refused("queue-full", lambda: ask("2001:db8::3"))
    refused("awaits-approval", lambda: ask("192.0.2.1"))
    refused("queue-full", lambda: ask("192.0.2.2"))
    site.reopen(admission={"queue": 100, "applications_per_hour": 3})
    refused("queue-full", lambda: ask("192.0.2.3"))
    with site.coordinator.ledger.write() as session:
        for applicant in session.scalars(select(Applicant)):
            applicant.seen_unix -= applicants.FORGET_SECONDS + 1
    refused("awaits-approval", lambda: ask("192.0.2.3"))
    assert len(applicants.waiting(site.coordinator)) == 1


def test_a_revoked_invite_lets_nobody_in_and_may_take_those_who_came_with_it(site: Site) -> None:
    invite = site.registry.invite(uses=5, expires_seconds=3600)
    first = NodeKey.generate()
    site.registry.enrol(site.request(invite.token, first), "peer")
    number = list_invites(site.coordinator)[0][0].invite_id
    assert open_invites(site.coordinator, time.time()) == 1
    assert revoke(site.registry, number, ban=True, reason="A wave.") == [first.node_id]
    assert site.node(first.node_id).sentence == "A wave."
    second = NodeKey.generate()
    refused("invite-revoked", lambda: site.registry.enrol(site.request(invite.token, second), "p"))
    (row,) = invite_rows(list_invites(site.coordinator), time.time())
    assert (row["state"], row["nodes"], row["uses_left"]) == ("revoked", 1, 4)
    assert open_invites(site.coordinator, time.time()) == 0
    with pytest.raises(ConfigError, match="no invite"):
        revoke(site.registry, 99, ban=False, reason="")


def test_a_lifted_ban_gives_back_what_the_node_had_proved_and_no_more(site: Site) -> None:
    proved = site.add_node("anna")
    fresh, _ = site.enrol("ben")
    for node_id in (proved, fresh):
        site.registry.ban(node_id, "Why not.")
        assert node_id in site.desk.banned_nodes()
    assert site.registry.lift(proved) == "admitted"
    assert site.registry.lift(fresh) == "proving"
    assert site.desk.banned_nodes() == frozenset()
    with pytest.raises(ConfigError, match="not banned"):
        site.registry.lift(fresh)
