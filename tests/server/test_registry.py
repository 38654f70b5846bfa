"""Nodes and invites in a real ledger: who comes in, proves itself, is banned and comes back."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select

from talkoot.protocol import recipes
from talkoot.protocol.errors import (
    ConfigError,
    IntegrityError,
    ProtocolError,
    RefusedError,
    UnavailableError,
    VersionError,
)
from talkoot.protocol.identity import NodeKey, load_certificate, load_public_key, verify
from talkoot.protocol.messages import NodeReport, Verdict, VersionStatement
from talkoot.protocol.model import parse_config
from talkoot.protocol.proof import proof_result
from talkoot.server.admission import judge_proof
from talkoot.server.ledger.schema import Event, Invite, Node, NodeState, ProofRecord
from talkoot.server.registry import find_node

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any

GIB = 2**30


def count(site: Site, table: type) -> int:
    with site.coordinator.ledger.read() as session:
        return int(session.scalar(select(func.count()).select_from(table)) or 0)


def refused(code: str, action: Callable[[], object]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        action()
    assert caught.value.code == code
    return caught.value


def report(**changes: object) -> NodeReport:
    fields: dict[str, object] = {
        "state": "idle",
        "version": 0,
        "weights_digest": None,
        "lease_id": None,
        "step": 0,
        "steps": 0,
        "loss": None,
        "tokens_per_second": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "healed": 0,
        "started_unix": 1.0,
    }
    return NodeReport.model_validate({**fields, **changes})


def true_result(
    site: Site, nonce: str, recipe: str = "fp32-adamw", steps: int = 2
) -> tuple[float, list[float]]:
    spec = site.coordinator.spec
    config = parse_config(site.coordinator.store.path(spec.model.digest).read_bytes())
    return proof_result(
        config,
        nonce,
        sequence_length=spec.sequence_length,
        micro_batch=spec.micro_batch,
        steps=steps,
        inner=spec.inner,
        recipe=recipes.get(recipe),
    )


def truth(site: Site, nonce: str, recipe: str = "fp32-adamw") -> dict[str, object]:
    loss, sketch = true_result(site, nonce, recipe)
    return {"loss": loss, "sketch": tuple(sketch)}


def prove(site: Site, node_id: str, **changes: object) -> Verdict:
    """A whole proof, as an honest node makes it but for ``changes``."""
    nonce = site.registry.challenge(node_id).nonce
    fields = {**truth(site, nonce), **changes}
    return site.registry.prove(node_id, site.proof(node_id, nonce, **fields))


# Enrolment ----------------------------------------------------------------------


def test_a_node_enrols_and_gets_a_certificate_for_its_own_key(site: Site) -> None:
    node_id, reply = site.enrol("anna")
    certificate = load_certificate(reply.certificate_pem.encode())
    assert reply.node_id == node_id
    assert certificate.public_key() == site.keys[node_id].public_key
    assert site.node(node_id).status == "proving"
    assert site.registry.authorize(node_id).code == "proving"


def test_enrolling_again_after_a_lost_answer_costs_no_second_use(site: Site) -> None:
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    key = NodeKey.generate()
    first = site.registry.enrol(site.request(invite.token, key), "peer")
    again = site.registry.enrol(site.request(invite.token, key), "peer")
    assert first.node_id == again.node_id
    assert count(site, Node) == 1
    assert list(site.flower.nodes) == [key.public_pem]


def test_a_node_has_the_role_of_the_invite_that_it_came_with(site: Site) -> None:
    for role in ("volunteer", "validator"):
        key = NodeKey.generate()
        invite = site.registry.invite(uses=1, expires_seconds=3600, role=role)
        site.registry.enrol(site.request(invite.token, key), "127.0.0.1")
        assert site.node(key.node_id).role == role


@pytest.mark.parametrize("ledger_kind", ["sqlite", "postgresql"])
def test_an_invite_of_one_use_lets_one_node_in_however_many_come_at_once(site: Site) -> None:
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    requests = [site.request(invite.token, NodeKey.generate(), f"n{i}") for i in range(4)]
    outcomes: list[str] = []

    def enrol(number: int) -> None:
        try:
            site.registry.enrol(requests[number], "peer")
            outcomes.append("in")
        except RefusedError as err:
            outcomes.append(err.code)

    threads = [threading.Thread(target=enrol, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in", "invite-used", "invite-used", "invite-used"]
    assert count(site, Node) == 1


def test_unknown_expired_and_used_invites_are_refused_each_with_its_reason(site: Site) -> None:
    registry, key = site.registry, NodeKey.generate()
    expired = registry.invite(uses=1, expires_seconds=-1)
    refused("invite-unknown", lambda: registry.enrol(site.request("x" * 32, key), "peer"))
    refused("invite-expired", lambda: registry.enrol(site.request(expired.token, key), "peer"))
    used = registry.invite(uses=1, expires_seconds=3600)
    registry.enrol(site.request(used.token, NodeKey.generate()), "peer")
    refused("invite-used", lambda: registry.enrol(site.request(used.token, key), "peer"))
    assert count(site, Node) == 1


def test_the_ledger_holds_no_token(site: Site) -> None:
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    with site.coordinator.ledger.read() as session:
        kept = session.scalars(select(Invite.token_sha256)).one()
    assert invite.token is not None
    assert invite.token not in kept
    site.coordinator.close()
    assert invite.token.encode() not in (site.coordinator.state.root / "ledger.db").read_bytes()


@pytest.mark.parametrize(("protocol", "who"), [(0, "on the node"), (99, "the operator must")])
def test_another_protocol_version_is_told_who_must_upgrade(
    site: Site, protocol: int, who: str
) -> None:
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    request = site.request(invite.token, NodeKey.generate())
    with pytest.raises(VersionError, match=who):
        site.registry.enrol(request.model_copy(update={"protocol": protocol}), "peer")


def test_a_node_too_small_is_refused_with_numbers_and_keeps_the_invite_good(site: Site) -> None:
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    request = site.request(invite.token, NodeKey.generate())
    small = request.capability.model_copy(update={"device_free_bytes": 1024})
    error = refused(
        "too-little-memory",
        lambda: site.registry.enrol(request.model_copy(update={"capability": small}), "peer"),
    )
    assert "MiB" in error.sentence
    assert site.flower.nodes == {}
    site.registry.enrol(request, "peer")


def test_a_request_that_its_key_did_not_sign_is_refused(site: Site) -> None:
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    request = site.request(invite.token, NodeKey.generate())
    lines = request.csr_pem.splitlines()
    lines[5] = lines[5][::-1]
    broken = request.model_copy(update={"csr_pem": "\n".join(lines) + "\n"})
    with pytest.raises(ProtocolError):
        site.registry.enrol(broken, "peer")
    assert count(site, Node) == 0


@pytest.mark.parametrize("trouble", ["down", "silent"])
def test_a_superlink_in_trouble_means_try_again_and_loses_no_use(site: Site, trouble: str) -> None:
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    request = site.request(invite.token, NodeKey.generate())
    setattr(site.flower, trouble, True)
    with pytest.raises(UnavailableError):
        site.registry.enrol(request, "peer")
    setattr(site.flower, trouble, False)
    site.registry.enrol(request, "peer")
    assert count(site, Node) == 1


def test_a_coordinator_that_died_between_flower_and_the_ledger_enrols_the_node_again(
    site: Site,
) -> None:
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    key = NodeKey.generate()
    number = site.flower.register_node(key.public_pem, "anna")  # and then it died
    site.registry.enrol(site.request(invite.token, key), "peer")
    assert site.node(key.node_id).flower_node_id == str(number)


def test_nodes_that_flower_has_forgotten_are_registered_anew_and_the_banned_are_not(
    site: Site,
) -> None:
    kept, lost, banned = (site.enrol()[0] for _ in range(3))
    before = site.node(kept).flower_node_id
    site.registry.ban(banned, "Too loud.")
    for node_id in (lost, banned):
        del site.flower.nodes[site.node(node_id).public_key_pem.encode()]
    assert site.registry.register_lost() == 1
    assert site.node(kept).flower_node_id == before
    pem = site.node(lost).public_key_pem.encode()
    assert site.node(lost).flower_node_id == str(site.flower.nodes[pem])
    assert site.node(banned).public_key_pem.encode() not in site.flower.nodes
    assert site.registry.register_lost() == 0


# Proof ----------------------------------------------------------------------


def test_an_honest_proof_admits_and_its_speed_is_noted(site: Site) -> None:
    node_id, _ = site.enrol()
    assert prove(site, node_id, tokens_per_second=777.0).code == "admitted"
    node = site.node(node_id)
    assert (node.status, node.tokens_per_second, node.nonce) == ("admitted", 777.0, None)


def test_a_loss_that_was_not_computed_is_refused_and_a_true_one_admits_afterwards(
    site: Site,
) -> None:
    node_id, _ = site.enrol()
    assert prove(site, node_id, loss=1.0).code == "wrong-loss"
    assert site.node(node_id).status == "refused"
    assert prove(site, node_id).accepted
    assert site.node(node_id).status == "admitted"


def test_a_proof_is_recomputed_by_the_recipe_that_it_names(site: Site) -> None:
    node_id, _ = site.enrol()
    nonce = site.registry.challenge(node_id).nonce
    # Proofs draw bf16 weights in bf16, so the two recipes do not begin alike.
    claim = truth(site, nonce, "bf16-backward-adamw8")
    signed = site.proof(node_id, nonce, recipe="bf16-backward-adamw8", **claim)
    assert site.registry.prove(node_id, signed).accepted
    other, _ = site.enrol()
    nonce = site.registry.challenge(other).nonce
    with pytest.raises(RefusedError) as refused:
        site.registry.prove(other, site.proof(other, nonce, recipe="homemade"))
    assert refused.value.code == "unknown-recipe"


def test_a_prover_that_guesses_the_loss_or_skips_a_step_is_found_by_the_fingerprint(
    site: Site,
) -> None:
    guess = math.log(260)  # of a model of bytes that knows nothing
    node_id, _ = site.enrol()
    nothing = prove(site, node_id, loss=guess, sketch=())
    assert (nothing.accepted, nothing.code) == (False, "wrong-fingerprint")
    assert "prove again, with nothing skipped" in nothing.sentence
    assert prove(site, node_id, loss=guess, sketch=(1.0,) * 64).code == "wrong-fingerprint"
    nonce = site.registry.challenge(node_id).nonce
    _, half = true_result(site, nonce, steps=1)
    claim = {**truth(site, nonce), "sketch": tuple(half)}
    assert site.registry.prove(node_id, site.proof(node_id, nonce, **claim)).code == (
        "wrong-fingerprint"
    )
    assert site.node(node_id).status == "refused"
    assert prove(site, node_id).accepted


def test_a_challenge_is_good_for_one_proof(site: Site) -> None:
    node_id, _ = site.enrol()
    nonce = site.registry.challenge(node_id).nonce
    signed = site.proof(node_id, nonce, **truth(site, nonce))
    assert site.registry.prove(node_id, signed).accepted
    assert site.registry.prove(node_id, signed).code == "stale-proof"
    assert site.node(node_id).status == "admitted", "a replay takes nothing away"


def test_only_the_newest_challenge_counts(site: Site) -> None:
    node_id, _ = site.enrol()
    old = site.registry.challenge(node_id).nonce
    site.registry.challenge(node_id)
    assert site.registry.prove(node_id, site.proof(node_id, old)).code == "stale-proof"
    assert count(site, ProofRecord) == 0, "what says nothing is not kept: it would fill the ledger"


def test_a_proof_of_another_node_run_or_key_is_refused(site: Site) -> None:
    anna, _ = site.enrol("anna")
    bert, _ = site.enrol("bert")
    nonce = site.registry.challenge(anna).nonce
    registry = site.registry
    refused(
        "wrong-proof",
        lambda: registry.prove(anna, site.proof(anna, nonce, run_id="another")),
    )
    refused("wrong-proof", lambda: registry.prove(anna, site.proof(anna, nonce, node_id=bert)))
    with pytest.raises(IntegrityError):
        registry.prove(anna, site.proof(bert, nonce))


def test_a_ban_while_a_proof_is_judged_stands(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    node_id, _ = site.enrol()
    nonce = site.registry.challenge(node_id).nonce
    signed = site.proof(node_id, nonce, **truth(site, nonce))

    def judged_while_the_operator_bans(*args: Any, **kwargs: Any) -> Verdict:
        verdict = judge_proof(*args, **kwargs)
        site.registry.ban(node_id, "Not you.")
        return verdict

    monkeypatch.setattr("talkoot.server.registry.judge_proof", judged_while_the_operator_bans)
    refused("banned", lambda: site.registry.prove(node_id, signed))
    assert site.node(node_id).status == "banned"


def test_with_manual_approval_a_proof_waits_for_the_operator(site: Site) -> None:
    site.reopen(admission={"approve": "manual"})
    node_id, _ = site.enrol()
    with pytest.raises(ConfigError, match="has not proved"):
        site.registry.approve(node_id)
    assert prove(site, node_id).code == "awaits-approval"
    assert site.node(node_id).status == "pending"
    site.registry.approve(node_id)
    assert site.node(node_id).status == "admitted"
    assert prove(site, node_id).accepted, "approved once, it need not be approved again"


# Bans ----------------------------------------------------------------------


def test_a_ban_shuts_every_plane_and_an_approval_opens_them_again(site: Site) -> None:
    node_id, _ = site.enrol()
    assert prove(site, node_id).accepted
    pem = site.keys[node_id].public_pem
    site.registry.ban(node_id, "Too loud.")
    assert site.registry.authorize(node_id).code == "banned"
    assert site.registry.banned(pem) == "This node is banned: Too loud."
    invite = site.registry.invite(uses=1, expires_seconds=3600)
    error = refused(
        "banned",
        lambda: site.registry.enrol(site.request(invite.token, site.keys[node_id]), "peer"),
    )
    assert "Too loud." in error.sentence

    site.registry.approve(node_id)
    assert site.registry.authorize(node_id).code == "admitted"
    assert site.registry.banned(pem) is None
    assert site.node(node_id).flower_node_id == str(site.flower.nodes[pem])


def test_a_ban_stands_when_the_superlink_is_down_and_approving_waits_for_it(site: Site) -> None:
    node_id, _ = site.enrol()
    assert prove(site, node_id).accepted
    site.flower.down = True
    site.registry.ban(node_id, "Too loud.")
    assert site.node(node_id).status == "banned"
    with pytest.raises(UnavailableError):
        site.registry.approve(node_id)
    assert site.node(node_id).status == "banned", "admitted is only whom the SuperLink knows"
    site.flower.down = False
    site.registry.approve(node_id)
    assert site.node(node_id).status == "admitted"


def test_an_approval_that_flower_does_not_answer_leaves_the_old_ban(site: Site) -> None:
    node_id, _ = site.enrol()
    assert prove(site, node_id).accepted
    site.registry.ban(node_id, "Too loud.")
    site.flower.nodes.clear()  # its database was lost
    site.flower.silent = True
    with pytest.raises(UnavailableError):
        site.registry.approve(node_id)
    assert site.node(node_id).status == "banned"
    assert site.node(node_id).flower_node_id != "None"


def test_a_stale_proof_does_not_cost_a_node_its_standing(site: Site) -> None:
    node_id, _ = site.enrol()
    nonce = site.registry.challenge(node_id).nonce
    signed = site.proof(node_id, nonce, **truth(site, nonce))
    assert site.registry.prove(node_id, signed).accepted
    site.registry.prove(node_id, signed)
    site.registry.ban(node_id, "A mistake.")
    site.registry.approve(node_id)
    assert site.node(node_id).status == "admitted"


# Reports ----------------------------------------------------------------------


def test_a_report_is_noted_and_answered_with_where_the_run_stands(site: Site) -> None:
    node_id = site.add_node("anna")
    answer = site.registry.report(node_id, report(version=0))
    assert (answer.status, answer.latest_version, answer.run_finished) == ("admitted", 0, False)
    assert answer.latest is None
    assert count(site, NodeState) == 1


def test_a_node_that_is_behind_is_shown_the_signed_way_to_the_newest_version(site: Site) -> None:
    node_id = site.add_node("anna")
    answer = site.registry.report(node_id, report(version=None))
    assert answer.latest is not None
    key = load_public_key(site.enrol("bert")[1].coordinator_key_pem.encode())
    ref = verify(answer.latest, "VersionStatement", key, VersionStatement).ref
    assert (ref.version, ref.checkpoint_version, ref.updates) == (0, 0, ())


def test_a_daemon_that_started_anew_is_counted_as_a_restart_and_told_once(site: Site) -> None:
    node_id = site.add_node("anna")
    for started in (1.0, 1.0, 2.0, 2.0):
        site.registry.report(node_id, report(started_unix=started))
    with site.coordinator.ledger.read() as session:
        assert session.get_one(NodeState, node_id).restarts == 1
        kinds = list(session.scalars(select(Event.kind)))
    assert kinds.count("returned") == 1


def test_a_node_polls_no_faster_than_the_network_bears(site: Site) -> None:
    site.reopen(network={"max_pulls_per_second": 0.5, "min_poll_seconds": 0.25})
    for number in range(4):
        site.add_node(f"n{number}")
    for node_id in site.keys:
        answer = site.registry.report(node_id, report())
    assert answer.poll_seconds == 8.0
    assert answer.report_seconds == 32.0


def test_nodes_that_left_long_ago_slow_down_nobody(site: Site) -> None:
    site.reopen(network={"max_pulls_per_second": 0.5, "min_poll_seconds": 0.25})
    long_ago, anna = site.add_node("long-ago"), site.add_node("anna")
    site.registry.report(long_ago, report())
    with site.coordinator.ledger.write() as session:
        session.get_one(NodeState, long_ago).seen_unix -= 7200
    assert site.registry.report(anna, report()).poll_seconds == 2.0


def test_a_node_that_is_told_to_report_seldom_is_not_taken_for_lost_in_between(
    site: Site,
) -> None:
    site.reopen(network={"max_pulls_per_second": 0.01})
    node_id = site.add_node("anna")
    answer = site.registry.report(node_id, report(version=0))
    patience = 3 * answer.report_seconds
    assert patience > site.coordinator.config.round.lost_after_seconds
    with site.coordinator.ledger.read() as session:
        seen = session.get_one(NodeState, node_id).seen_unix
        for silent, leased in ((0.9 * patience, [node_id]), (1.1 * patience, [])):
            members = site.book.members(session, site.online(), seen + silent)
            assert [member.node_id for member in members] == leased


def test_a_stranger_may_not_report_and_is_not_authorized(site: Site) -> None:
    assert site.registry.authorize("0" * 16).code == "unknown-node"
    refused("unknown-node", lambda: site.registry.report("0" * 16, report()))


def test_a_node_is_found_by_id_beginning_or_name_and_never_by_a_guess(site: Site) -> None:
    anna, bert = site.add_node("anna"), site.add_node("bert")
    nodes = site.registry.nodes()
    assert find_node(nodes, anna).name == "anna"
    assert find_node(nodes, "bert").node_id == bert
    assert find_node(nodes, anna[:15]).node_id == anna
    for wanted in ("", "carl"):
        with pytest.raises(ConfigError, match="No nodes match"):
            find_node(nodes, wanted)
    site.add_node("anna")
    with pytest.raises(ConfigError, match="2 nodes match"):
        find_node(site.registry.nodes(), "anna")
