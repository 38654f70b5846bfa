"""From an upload to the ledger: what a contribution goes through, and where it may fail."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sqlalchemy import select

from talkoot.protocol.codec import encode_tensor
from talkoot.protocol.errors import IntegrityError, RefusedError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.manifest import Manifest, TensorSpec
from talkoot.protocol.messages import ArtifactRef, RoundTask, Verdict, canonical_bytes
from talkoot.protocol.payload import verify_payload, write_payload
from talkoot.server.ledger.schema import CommittedBlock, ContributionRecord, Event

if TYPE_CHECKING:
    from .conftest import Site
else:
    Site = Any

NOW = 1_800_000_000.0


@pytest.fixture
def anna(site: Site) -> str:
    return site.add_node("anna")


@pytest.fixture
def task(site: Site, anna: str) -> RoundTask:
    assert site.book.open_round(site.online(), 0.25, now=NOW) is not None
    return site.task(anna)


def submit(site: Site, task: RoundTask, ref: ArtifactRef, **changes: object) -> Verdict:
    claim = site.claim(task, ref, **changes)
    return site.desk.submit(task.lease.node_id, site.sign(claim))


def arrive(site: Site, task: RoundTask, data: bytes) -> ArtifactRef:
    """Bytes that the transfer service has received whole and verified against their digest."""
    ref = site.coordinator.store.put_bytes(data)
    path = site.coordinator.state.incoming / "arrived"
    path.write_bytes(data)
    site.coordinator.store.delete(ref.digest)
    site.desk.pushed(task.lease.node_id, task.lease.lease_id, ref.digest, path)
    return ref


def uploads(site: Site) -> list[str]:
    return sorted(path.name for path in (site.coordinator.state.incoming / "whole").iterdir())


def contributions(site: Site) -> list[ContributionRecord]:
    with site.coordinator.ledger.read() as session:
        return list(session.scalars(select(ContributionRecord)))


def test_a_pushed_payload_is_verified_stored_and_committed(site: Site, task: RoundTask) -> None:
    node_id, lease_id = task.lease.node_id, task.lease.lease_id
    ref = site.push(node_id, lease_id, seed=1)
    assert site.desk.has_pushed(node_id, lease_id, ref.digest)
    assert submit(site, task, ref).accepted
    (record,) = contributions(site)
    stored = site.coordinator.store.path(ref.digest)
    facts = verify_payload(stored, site.coordinator.manifest, site.coordinator.spec.uplink)
    assert record.l2_norm == facts.l2_norm > 0
    assert record.payload_digest == ref.digest
    assert uploads(site) == []


def test_after_a_lost_acknowledgement_the_same_is_accepted_again(
    site: Site, task: RoundTask
) -> None:
    ref = site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    signed = site.sign(site.claim(task, ref))
    first = site.desk.submit(task.lease.node_id, signed)
    assert site.desk.submit(task.lease.node_id, signed).accepted
    assert first.accepted
    assert len(contributions(site)) == 1


def test_the_acknowledgement_comes_even_when_the_payload_is_gone_from_the_store(
    site: Site, task: RoundTask
) -> None:
    ref = site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    signed = site.sign(site.claim(task, ref))
    assert site.desk.submit(task.lease.node_id, signed).accepted
    site.coordinator.store.delete(ref.digest)  # published and collected since
    assert site.desk.submit(task.lease.node_id, signed).accepted


def test_after_a_lost_acknowledgement_of_the_push_the_same_may_be_pushed_again(
    site: Site, task: RoundTask
) -> None:
    ref = site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    claim = (task.lease.node_id, task.lease.lease_id, ref.digest)
    assert site.desk.has_pushed(*claim)
    assert submit(site, task, ref).accepted
    assert site.desk.has_pushed(*claim)
    assert site.desk.may_push(*claim, ref.size_bytes).accepted


def test_two_submissions_at_once_commit_once_and_both_hear_yes(site: Site, task: RoundTask) -> None:
    ref = site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    signed = site.sign(site.claim(task, ref))
    verdicts: list[Verdict] = []
    threads = [
        threading.Thread(
            target=lambda: verdicts.append(site.desk.submit(task.lease.node_id, signed))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.accepted for verdict in verdicts] == [True] * 4
    assert len(contributions(site)) == 1


def test_a_coordinator_that_died_between_store_and_ledger_accepts_without_another_push(
    site: Site, task: RoundTask, tmp_path: Path
) -> None:
    ref = site.write_payload(tmp_path / "payload", seed=1)
    site.coordinator.store.put_file(tmp_path / "payload")  # and then it died
    assert site.desk.has_pushed(task.lease.node_id, task.lease.lease_id, ref.digest)
    assert submit(site, task, ref).accepted


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, os.urandom(5000)])
def test_a_payload_that_is_none_is_refused_dropped_and_told_and_the_lease_stays_open(
    site: Site, task: RoundTask, data: bytes
) -> None:
    ref = arrive(site, task, data)
    verdict = submit(site, task, ref)
    assert (verdict.accepted, verdict.code) == (False, "payload-malformed")
    assert uploads(site) == []
    assert not site.coordinator.store.has(ref.digest)
    assert contributions(site) == []
    with site.coordinator.ledger.read() as session:
        told = session.scalars(select(Event.sentence).where(Event.kind == "refused")).one()
    assert task.lease.node_id in told
    good = site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    assert submit(site, task, good).accepted


def test_a_payload_for_another_model_is_refused(
    site: Site, task: RoundTask, tmp_path: Path
) -> None:
    other = Manifest(tensors=(TensorSpec(name="other", shape=(64, 64), dtype="float32"),))
    codec = site.coordinator.spec.uplink
    encoded = encode_tensor(torch.ones(64, 64), codec)
    write_payload(tmp_path / "payload", other, codec, [("other", encoded)], {})
    ref = arrive(site, task, (tmp_path / "payload").read_bytes())
    assert submit(site, task, ref).code == "payload-malformed"
    assert contributions(site) == []


def test_one_changed_byte_anywhere_is_refused_or_still_a_whole_payload(
    site: Site, task: RoundTask, tmp_path: Path
) -> None:
    site.write_payload(tmp_path / "payload", seed=1)
    whole = (tmp_path / "payload").read_bytes()
    for place in range(0, len(whole), len(whole) // 12):
        data = bytearray(whole)
        data[place] ^= 0xFF
        ref = arrive(site, task, bytes(data))
        verdict = submit(site, task, ref)
        if verdict.accepted:
            facts = verify_payload(
                site.coordinator.store.path(ref.digest),
                site.coordinator.manifest,
                site.coordinator.spec.uplink,
            )
            assert facts.l2_norm == contributions(site)[0].l2_norm
            return
        assert uploads(site) == []


def test_a_size_that_is_not_as_signed_is_refused_and_the_upload_dropped(
    site: Site, task: RoundTask
) -> None:
    ref = site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    lying = ref.model_copy(update={"size_bytes": ref.size_bytes + 1})
    assert submit(site, task, lying).code == "wrong-size"
    assert uploads(site) == []
    assert contributions(site) == []


def test_a_payload_that_never_came_is_asked_for(site: Site, task: RoundTask) -> None:
    site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    absent = ArtifactRef(digest="0" * 64, size_bytes=5)
    with pytest.raises(RefusedError) as caught:
        submit(site, task, absent)
    assert caught.value.code == "not-pushed"


def test_an_artifact_of_the_coordinators_own_cannot_pass_for_a_payload(
    site: Site, task: RoundTask
) -> None:
    own = site.coordinator.spec.manifest
    assert submit(site, task, own).code == "payload-malformed"
    assert site.coordinator.store.has(own.digest), "refusing it does not delete it"


def test_a_claim_must_be_signed_by_the_node_that_sends_it(site: Site, task: RoundTask) -> None:
    anna, bert = task.lease.node_id, site.add_node("bert")
    ref = site.push(anna, task.lease.lease_id, seed=1)
    claim = site.claim(task, ref)
    body = canonical_bytes(claim)
    with pytest.raises(IntegrityError):
        site.desk.submit(anna, NodeKey.generate().sign("Contribution", body))
    with pytest.raises(IntegrityError):
        site.desk.submit(anna, site.keys[anna].sign("Proof", body))
    with pytest.raises(IntegrityError):
        site.desk.submit(bert, site.sign(claim))
    foreign = site.keys[bert].sign("Contribution", body)
    assert site.desk.submit(bert, foreign).code == "wrong-node"
    assert contributions(site) == []


def test_a_claim_for_another_run_is_refused(site: Site, task: RoundTask) -> None:
    ref = site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    assert submit(site, task, ref, run_id="another").code == "wrong-node"


def test_a_copied_payload_commits_nothing_for_the_copyist(site: Site) -> None:
    anna, bert = site.add_node("anna"), site.add_node("bert")
    site.book.open_round(site.online(), 0.25, now=NOW)
    mine, copy = site.task(anna), site.task(bert)
    ref = site.push(anna, mine.lease.lease_id, seed=1)
    assert submit(site, mine, ref).accepted
    assert site.desk.has_pushed(bert, copy.lease.lease_id, ref.digest)
    assert submit(site, copy, ref).code == "copied"
    assert site.coordinator.store.has(ref.digest), "anna's payload stays"
    with site.coordinator.ledger.read() as session:
        assert set(session.scalars(select(CommittedBlock.lease_id))) == {mine.lease.lease_id}


def test_what_a_node_has_pushed_is_nobodys_to_read_overwrite_or_claim(site: Site) -> None:
    anna, bo = site.add_node("anna"), site.add_node("bo")
    site.book.open_round(site.online(), 1.0, now=NOW)
    task = site.task(anna)
    lease_id = task.lease.lease_id
    ref = site.push(anna, lease_id, seed=7)
    # Nobody fetches it by its digest, not even who knows it.
    assert site.desk.source().lookup(ref.digest) is None
    # Under her lease nobody else pushes, resumes or asks what is there.
    assert not site.desk.may_push(bo, lease_id, ref.digest, ref.size_bytes).accepted
    assert not site.desk.has_pushed(bo, lease_id, ref.digest)
    assert not site.desk.has_pushed(bo, site.task(bo).lease.lease_id, ref.digest)
    # Claimed under another's lease, or for oneself without pushing, it is refused.
    claim = site.claim(task, ref)
    assert not site.desk.submit(
        bo,
        site.keys[bo].sign(
            "Contribution", canonical_bytes(claim.model_copy(update={"node_id": bo}))
        ),
    ).accepted
    with pytest.raises(RefusedError, match="never pushed"):
        site.desk.submit(bo, site.sign(site.claim(site.task(bo), ref)))
    # It is as she left it.
    assert site.desk.submit(anna, site.sign(claim)).accepted


def test_a_late_contribution_is_refused_with_its_reason_and_its_upload_dropped(
    site: Site, task: RoundTask
) -> None:
    ref = site.push(task.lease.node_id, task.lease.lease_id, seed=1)
    site.registry.ban(task.lease.node_id, "No.")
    assert submit(site, task, ref).code == "late"
    assert uploads(site) == []
    assert not site.coordinator.store.has(ref.digest)


def test_nothing_is_taken_that_could_not_be_a_contribution(site: Site, task: RoundTask) -> None:
    bert = site.add_node("bert")
    anna, lease_id = task.lease.node_id, task.lease.lease_id
    assert site.desk.may_push(anna, lease_id, "0" * 64, 1000).accepted
    assert site.desk.may_push(anna, lease_id, "0" * 64, 2**40).code == "too-large"
    assert site.desk.may_push(bert, lease_id, "0" * 64, 1000).code == "unknown-lease"
    assert site.desk.may_push(anna, "0" * 32, "0" * 64, 1000).code == "unknown-lease"
    site.book.decline(anna, lease_id, "no time")
    assert site.desk.may_push(anna, lease_id, "0" * 64, 1000).code == "late"


def test_a_node_cannot_fill_the_disk_with_uploads(site: Site, task: RoundTask) -> None:
    node_id, lease_id = task.lease.node_id, task.lease.lease_id
    bert = site.add_node("bert")
    site.push(bert, "0" * 32, seed=9)
    refs = [site.push(node_id, lease_id, seed=seed) for seed in range(4)]
    assert [name.split("-")[0] for name in uploads(site)] == sorted([node_id, bert])
    assert not site.desk.has_pushed(node_id, lease_id, refs[0].digest)
    assert submit(site, task, refs[-1]).accepted
