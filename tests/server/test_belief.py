"""Who is believed, in a real ledger: evidence, quarantine, pardon and validation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sqlalchemy import select

from talkoot.protocol.codec import encode_tensor
from talkoot.protocol.errors import ConfigError
from talkoot.protocol.messages import ArtifactRef, RoundTask, Verdict
from talkoot.protocol.payload import PayloadReader, write_payload
from talkoot.protocol.steps import steps_of
from talkoot.server.acceptance import effort_of
from talkoot.server.belief import Belief
from talkoot.server.ledger.schema import JudgementRecord, ValidationRecord
from talkoot.server.validator import Validator

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any

NOW = 1_800_000_000.0


def opened(site: Site, *names: str) -> dict[str, RoundTask]:
    nodes = {name: site.add_node(name) for name in names}
    assert site.book.open_round(site.online(), 0.25, now=NOW) is not None
    return {name: site.task(node_id) for name, node_id in nodes.items()}


def push(site: Site, task: RoundTask, tensors: dict[str, torch.Tensor]) -> ArtifactRef:
    manifest, codec = site.coordinator.manifest, site.coordinator.spec.uplink
    path = site.coordinator.state.incoming / "made"
    items = ((t.name, encode_tensor(tensors[t.name], codec)) for t in manifest.tensors)
    write_payload(path, manifest, codec, items, {})
    ref = site.coordinator.store.put_bytes(path.read_bytes())
    site.coordinator.store.delete(ref.digest)
    site.desk.pushed(task.lease.node_id, task.lease.lease_id, ref.digest, path)
    return ref


def submit(site: Site, task: RoundTask, ref: ArtifactRef, **changes: object) -> Verdict:
    return site.desk.submit(task.lease.node_id, site.sign(site.claim(task, ref, **changes)))


def gradients(site: Site, seed: int) -> dict[str, torch.Tensor]:
    """Something in common, and something of its own."""
    common = torch.Generator().manual_seed(999)
    own = torch.Generator().manual_seed(seed)
    return {
        t.name: 1e-3
        * (torch.randn(t.shape, generator=common) + 0.5 * torch.randn(t.shape, generator=own))
        for t in site.coordinator.manifest.tensors
    }


def test_another_node_s_payload_with_one_value_changed_is_refused_and_held_against_it(
    site: Site,
) -> None:
    tasks = opened(site, "anna", "bob")
    ref = site.push(tasks["anna"].lease.node_id, tasks["anna"].lease.lease_id, seed=1)
    assert submit(site, tasks["anna"], ref).accepted
    manifest, codec = site.coordinator.manifest, site.coordinator.spec.uplink
    reader = PayloadReader(site.coordinator.store.path(ref.digest), manifest, codec)
    copied = {t.name: reader.decode(t.name).to_dense(t.numel) for t in manifest.tensors}
    first = copied[manifest.tensors[0].name]
    first[int(first.abs().argmax())] *= 0.5
    verdict = submit(site, tasks["bob"], push(site, tasks["bob"], copied))
    assert (verdict.accepted, verdict.code) == (False, "copied")
    assert site.lease(tasks["bob"].lease.lease_id).state == "released"  # nobody waits for it
    record = Belief(site.coordinator).record_of(tasks["bob"].lease.node_id)
    assert [e["kind"] for e in record["evidence"]] == ["copied"]


@pytest.mark.parametrize(
    ("code", "changes", "scale"),
    [("wrong-steps", {"steps": 5}, 1e-3), ("impossible-value", {}, 1e3)],
)
def test_what_cannot_be_is_refused_from_the_first_contribution_on(
    site: Site, code: str, changes: dict[str, object], scale: float
) -> None:
    task = opened(site, "anna")["anna"]
    ref = site.push(task.lease.node_id, task.lease.lease_id, seed=1, scale=scale)
    assert submit(site, task, ref, **changes).code == code


def test_of_claimed_steps_as_many_count_as_the_lease_can_have_been_trained_in(site: Site) -> None:
    task, spec = opened(site, "anna")["anna"], site.coordinator.spec
    batches = steps_of(spec, task.lease.tokens).batches
    assert [effort_of(spec, task, n).steps for n in (1, batches, 99)] == [batches] * 3
    inner = spec.inner.model_copy(update={"max_steps": 2, "rate_power": 0.5, "total_tokens": 0})
    joined = spec.model_copy(update={"inner": inner})
    claims = range(1, batches + 2)
    efforts = [effort_of(joined, task, claimed) for claimed in claims]
    assert [e.steps for e in efforts] == [min(max(n, 2), batches) for n in claims]
    rate = inner.learning_rate
    assert efforts[1].rate_sum == pytest.approx(2 * rate * (batches / 2) ** 0.5)
    assert efforts[-1].rate_sum == pytest.approx(batches * rate)


def test_a_reversed_contribution_moves_nothing_and_its_node_ends_in_quarantine_until_a_pardon(
    site: Site,
) -> None:
    belief = Belief(site.coordinator)
    names = [f"node{number}" for number in range(5)]
    tasks = opened(site, *names)
    for number, name in enumerate(names):
        sign = -1.0 if name == "node4" else 1.0
        made = {key: sign * value for key, value in gradients(site, number).items()}
        assert submit(site, tasks[name], push(site, tasks[name], made)).accepted
    site.book.close_round("all answered", now=NOW)
    belief.judge_round(1, now=NOW)
    belief.judge_round(1, now=NOW)  # after a crash: nothing is held against anybody twice
    liar = tasks["node4"].lease.node_id
    with site.coordinator.ledger.read() as session:
        judged = {row.node_id: row for row in session.scalars(select(JudgementRecord))}
    assert judged[liar].code == "set-aside"
    assert judged[liar].influence == 0
    assert sum(row.influence == 1 for row in judged.values()) == 4
    record = belief.record_of(liar)
    assert (record["standing"], record["suspicion"]) == ("probation", 2.5)

    for number in range(2, 5):
        with site.coordinator.ledger.write() as session:
            node = site.node(liar)
            node = session.merge(node)
            belief.hold_against(session, node, "set-aside", "Set aside.", number, None, now=NOW)
    assert site.node(liar).status == "quarantined"
    assert "Set aside." in site.node(liar).sentence
    assert site.registry.authorize(liar).accepted  # it is told, and may be pardoned
    with pytest.raises(ConfigError, match="pardon"):
        site.registry.approve(liar)
    belief.pardon(liar, now=NOW)
    assert site.node(liar).status == "admitted"
    assert belief.record_of(liar)["standing"] == "probation"
    belief.quarantine(liar, "I know better.", now=NOW)
    assert site.node(liar).status == "quarantined"


def test_a_lie_about_a_replayable_lease_is_found_and_what_does_harm_is_told_so(site: Site) -> None:
    site.reopen(belief={"replay_share": 1.0})
    task = opened(site, "anna")["anna"]
    assert task.fresh_state  # a first lease can be replayed
    ref = push(site, task, gradients(site, 1))
    assert submit(site, task, ref).accepted
    validator = Validator(site.coordinator)
    while validator.step():
        pass
    with site.coordinator.ledger.read() as session:
        found = {row.kind: row for row in session.scalars(select(ValidationRecord))}
    assert found["replay"].code == "replay-differs"
    assert abs(json.loads(found["replay"].figures)["cosine"]) < 0.2
    assert found["gain"].state == "done"
    record = Belief(site.coordinator).record_of(task.lease.node_id)
    assert record["suspicion"] >= 8.0
