"""The operator's side of a simulated network: state directory, register, admission of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select, update

from talkoot.client.enrol import Enrolment
from talkoot.client.home import Home, Settings
from talkoot.protocol.errors import RefusedError
from talkoot.protocol.identity import make_csr
from talkoot.protocol.limits import PROTOCOL_VERSION
from talkoot.protocol.messages import (
    EnrolRequest,
    MirrorList,
    NodeReport,
    Proof,
    Verdict,
    canonical_bytes,
)
from talkoot.protocol.recipes import REFERENCE
from talkoot.server.book import Book
from talkoot.server.config import Config
from talkoot.server.coordinator import Coordinator
from talkoot.server.desk import Desk
from talkoot.server.ledger.schema import ContributionRecord, Node, NodeState
from talkoot.server.registry import Registry
from talkoot.server.setup import Identity, init
from talkoot.sims.planning.fit import Fit, capability
from talkoot.sims.scenario import Scenario
from talkoot.sims.virtual.layout import Layout, Profile
from talkoot.sims.virtual.population import key_of

EPOCH = 1_767_225_600.0
"""2026-01-01 00:00 UTC, when every simulation begins."""


def config_of(scenario: Scenario) -> Config:
    """The operator's configuration, with what a simulation has no process for switched off."""
    config = scenario.config()
    # The validator is a process of its own, and proofs of one machine all have the same loss.
    belief = config.belief.model_copy(
        update={"gain_share": 0.0, "gain_share_probation": 0.0, "replay_share": 0.0}
    )
    admission = config.admission.model_copy(update={"check_proof_up_to_parameters": 0})
    return config.model_copy(update={"belief": belief, "admission": admission})


def make_state(layout: Layout, scenario: Scenario, say: Callable[[str], None]) -> None:
    """The operator's ``init``, with key and run id from the seed."""
    run_id = f"{scenario.name[:50]}-s{scenario.seed}"
    identity = Identity(key_of(scenario, "coordinator"), run_id, EPOCH)
    init(layout.state, config_of(scenario), say=say, identity=identity)


@dataclass
class Register:
    """Flower's register of keys: its simulation engine has made the nodes already."""

    free: list[int]
    known: dict[bytes, int]

    @classmethod
    def of(cls, flower_node_ids: Iterable[int]) -> Register:
        """All that the engine has."""
        return cls(sorted(flower_node_ids, reverse=True), {})

    def register_node(self, public_key_pem: bytes, name: str) -> int | None:
        """The next one; None for a key that is known."""
        if public_key_pem in self.known:
            return None
        self.known[public_key_pem] = self.free.pop()
        return self.known[public_key_pem]

    def registered_nodes(self) -> dict[bytes, int]:
        """Those that keys were given."""
        return dict(self.known)


@dataclass(frozen=True)
class Messages:
    """What a node says and hears beside artifacts: bytes of the real messages."""

    seconds: float
    """Between two reports."""
    report: int
    reply: int
    claim: int
    """A signed contribution."""
    verdict: int

    def of(self, seconds: float, contributions: float) -> tuple[float, float]:
        """Bytes up and down of so many seconds and contributions."""
        reports = seconds / self.seconds
        up = reports * self.report + contributions * self.claim
        return up, reports * self.reply + contributions * self.verdict


class Site:
    """An open coordinator on the virtual clock, and the nodes that it let in.

    Args:
        layout: of the run; its state is made.
        scenario: of the run.
        fits: of the populations, by place.
        clock: Unix seconds, virtual.
        flower_node_ids: of the engine's nodes.
    """

    def __init__(
        self,
        layout: Layout,
        scenario: Scenario,
        clock: Callable[[], float],
        flower_node_ids: Iterable[int],
    ) -> None:
        self._layout, self._scenario, self._clock = layout, scenario, clock
        self.coordinator = Coordinator.open(layout.state)
        self._register = Register.of(flower_node_ids)
        self.registry = Registry(self.coordinator, self._register, clock)
        self.desk = Desk(self.coordinator, self.registry)
        self.book = Book(self.coordinator)
        self.flower_ids: dict[int, int] = {}
        """By node: Flower's id, of those that were let in."""
        self.node_ids: dict[int, str] = {}
        """By node: talkoot's id."""
        self._say_what_all_hear()

    def _say_what_all_hear(self) -> None:
        coordinator, layout = self.coordinator, self._layout
        layout.write(layout.spec, coordinator.signed_spec)
        mirrors = MirrorList(run_id=coordinator.run_id, urls=(), issued_unix=self._clock())
        signed = coordinator.key.sign("MirrorList", canonical_bytes(mirrors))
        layout.write(layout.mirrors, signed)

    # Nodes ----------------------------------------------------------------------------------------

    def enrol(self, nodes: Sequence[tuple[Profile, Fit]]) -> dict[int, Verdict]:
        """Let nodes in through the real registry; by node, the verdict. Harmless to do again."""
        invite = self.registry.invite(uses=len(nodes) or 1, expires_seconds=86_400.0)
        found = {}
        for profile, fit in nodes:
            try:
                found[profile.index] = self._enrol(profile, fit, invite.token or "")
            except RefusedError as err:
                found[profile.index] = Verdict(accepted=False, code=err.code, sentence=err.sentence)
        return found

    def _enrol(self, profile: Profile, fit: Fit, token: str) -> Verdict:
        key = key_of(self._scenario, str(profile.index))
        has = capability(fit.node_class)
        reply = self.registry.enrol(
            EnrolRequest(
                protocol=PROTOCOL_VERSION,
                token=token,
                csr_pem=make_csr(key, key.node_id).decode("ascii"),
                name=profile.name,
                capability=has,
            ),
            "127.0.0.1",
        )
        home = Home(self._layout.home(profile.index))
        network = self.coordinator.config.network
        if not home.enrolment.exists():
            home.create()
            key.save(home.key)
            home.save(home.settings_path, Settings(threads=1))
            self._layout.profile(home.root).write_text(profile.model_dump_json(), encoding="utf-8")
            Enrolment(
                node_id=reply.node_id,
                name=profile.name,
                host="127.0.0.1",
                gateway_port=network.gateway_port,
                transfer_port=network.transfer_port,
                run_id=reply.run_id,
                trust_serial=1,
                ca_pem=self.coordinator.ca_pem.decode("ascii"),
                certificate_pem=reply.certificate_pem,
                coordinator_key_pem=reply.coordinator_key_pem,
            ).save(home.enrolment)
        flower_id = self._register.known[key.public_pem]
        link = self._layout.by_flower(flower_id)
        link.unlink(missing_ok=True)
        link.symlink_to(home.root)
        self.flower_ids[profile.index] = flower_id
        self.node_ids[profile.index] = key.node_id
        with self.coordinator.ledger.read() as session:
            status = session.get_one(Node, key.node_id).status
        if status != "proving":
            return Verdict(accepted=status == "admitted", code=status, sentence="Known already.")
        proof = Proof(
            run_id=self.coordinator.run_id,
            node_id=key.node_id,
            nonce=self.registry.challenge(key.node_id).nonce,
            recipe=profile.recipe,
            steps=2,
            loss=1.0,
            peak_bytes=fit.needs.device_bytes,
            predicted_bytes=fit.needs.device_bytes,
            tokens_per_second=profile.tokens_per_second,
            capability=has,
        )
        return self.registry.prove(key.node_id, key.sign("Proof", canonical_bytes(proof)))

    def report(self, index: int, *, version: int | None, digest: str | None) -> None:
        """A node says at which version it is."""
        self.desk.report(
            self.node_ids[index],
            NodeReport(
                state="idle",
                version=version,
                weights_digest=digest,
                lease_id=None,
                step=0,
                steps=0,
                loss=None,
                tokens_per_second=0.0,
                bytes_up=0,
                bytes_down=0,
                healed=0,
                started_unix=EPOCH,
            ),
        )

    def messages(self, now: float) -> Messages:
        """What the messages of a training node weigh: real ones are made and measured."""
        with self.coordinator.ledger.read() as session:
            claims = [len(text) for text in session.scalars(select(ContributionRecord.signed))]
            newest = self.book.latest_version(session)
            version, digest = newest.version, newest.weights_digest
        some = next(iter(self.node_ids.values()), None)
        if some is None:
            return Messages(1.0, 0, 0, 0, 0)
        report = NodeReport(
            state="training",
            version=version,  # who lacks it is told where it is, which is longer and soon over
            weights_digest=digest,
            lease_id="0" * 32,
            step=100,
            steps=100,
            loss=1.2345678901234567,
            tokens_per_second=1234.567890123456,
            bytes_up=10**7,
            bytes_down=10**7,
            healed=0,
            started_unix=now + 0.1234567,
            recipe=REFERENCE,
        )
        reply = self.desk.report(some, report)
        verdict = Verdict(accepted=True, code="accepted", sentence="Accepted.")
        return Messages(
            seconds=reply.report_seconds,
            report=len(canonical_bytes(report)),
            reply=len(canonical_bytes(reply)),
            claim=round(sum(claims) / max(len(claims), 1)),
            verdict=len(canonical_bytes(verdict)),
        )

    def heard(self, indices: Sequence[int], moment: float) -> None:
        """These nodes have reported since, and nothing new: so many reports in one transaction."""
        ids = [self.node_ids[index] for index in indices]
        with self.coordinator.ledger.write() as session:
            for start in range(0, len(ids), 500):
                session.execute(
                    update(NodeState)
                    .where(NodeState.node_id.in_(ids[start : start + 500]))
                    .values(seen_unix=moment)
                )

    def deliver(self, index: int, number: int, lease_id: str) -> Verdict:
        """A contribution has arrived: what the transfer service does with it, then the desk."""
        from talkoot.protocol.messages import Contribution, Signed, parse

        layout, desk, node_id = self._layout, self.desk, self.node_ids[index]
        signed = parse(Signed, layout.claim(number, lease_id).read_bytes())
        claim = parse(Contribution, signed.body.encode("ascii"))
        digest, payload = claim.payload.digest, layout.payload(number, lease_id)
        verdict = desk.may_push(node_id, lease_id, digest, claim.payload.size_bytes)
        if verdict.accepted:
            if not desk.has_pushed(node_id, lease_id, digest) and payload.exists():
                desk.pushed(node_id, lease_id, digest, _copy(payload))
            verdict = desk.submit(node_id, signed)
        layout.write(layout.verdict(lease_id), verdict)
        payload.unlink(missing_ok=True)
        return verdict

    def close(self) -> None:
        """Close the ledger."""
        self.coordinator.close()


def _copy(path: Path) -> Path:
    """The store moves what it is given, and colluders still look at the node's own."""
    twin = path.with_suffix(".pushed")
    twin.unlink(missing_ok=True)
    twin.hardlink_to(path)
    return twin
