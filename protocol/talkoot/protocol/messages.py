"""Every message of the protocol on one page: frozen, strict, capped.

A message travels as canonical JSON (:func:`canonical_bytes`). What must be believed travels inside
a :class:`Signed` envelope, which carries those very bytes and a signature over them (see
``identity.py``). Bulk data (weights, updates, blocks) never travels here: it is named by digest and
fetched over the data plane.

Units: ``*_bytes`` bytes, ``*_seconds`` seconds, ``*_unix`` seconds since the epoch, ``tokens``
tokens. Loss is the mean cross-entropy in nats per token.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from talkoot.protocol import limits
from talkoot.protocol.errors import ProtocolError

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Lower-case hexadecimal SHA-256."""
NodeId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""The first 16 hexadecimal digits of the SHA-256 of the node's public key (DER, SPKI)."""
RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
LeaseId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sentence = Annotated[str, Field(max_length=limits.MAX_SENTENCE_CHARS)]
Pem = Annotated[str, Field(min_length=1, max_length=16 * limits.KIB)]
"""One certificate."""
Name = Annotated[
    str, Field(min_length=1, max_length=limits.MAX_NAME_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$")
]


class Message(BaseModel):
    """Base of all messages: immutable, no unknown fields, no coercion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


M = TypeVar("M", bound=Message)


def canonical_bytes(message: Message) -> bytes:
    """The one encoding of a message: JSON, sorted keys, no spaces, ASCII only."""
    data: Any = message.model_dump(mode="json")
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def parse(kind: type[M], data: bytes, *, cap: int = limits.MAX_CONTROL_MESSAGE) -> M:
    """Read one message. Raises :class:`ProtocolError` on anything but a valid message."""
    if len(data) > cap:
        raise ProtocolError(
            f"A {kind.__name__} of {len(data)} bytes is over the cap of {cap} bytes.",
            code="too-large",
        )
    try:
        return kind.model_validate_json(data)
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the message"
        raise ProtocolError(
            f"Not a valid {kind.__name__}: {where}: {first['msg']}.", code="malformed"
        ) from err


# What is agreed about a run ----------------------------------------------------------------------


class Signed(Message):
    """Canonical bytes of a message and an ECDSA P-384 signature over (kind, bytes)."""

    kind: Annotated[str, Field(pattern=r"^[A-Za-z]{1,32}$")]
    body: str
    """The canonical JSON of the message, itself ASCII."""
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{16,256}$")]
    """DER, hexadecimal."""


class ArtifactRef(Message):
    """An artifact by digest, with the size that it must have."""

    digest: Digest
    size_bytes: Annotated[int, Field(ge=0, le=limits.MAX_ARTIFACT)]


class CodecSpec(Message):
    """How an update is written (``codec.py``).

    ``topk``: of every ``chunk`` consecutive elements keep the ``keep`` largest by magnitude, each
    as ``value_bits`` bits (SparseLoCo, arXiv 2508.15706, section 3). ``dense``: every element as
    fp32; exact, for tests and tiny models.
    """

    kind: Literal["topk", "dense"] = "topk"
    """``dense`` does not read the others."""
    chunk: Annotated[int, Field(ge=1, le=limits.MAX_CHUNK)] = 4096
    """Consecutive elements that compete with each other."""
    keep: Annotated[int, Field(ge=1, le=limits.MAX_CHUNK)] = 64
    """Elements of a chunk that are sent."""
    value_bits: Annotated[int, Field(ge=2, le=limits.MAX_VALUE_BITS)] = 2
    """A sign and a level."""


class InnerSpec(Message):
    """The inner optimizer (AdamW) and its schedule in tokens, which follows the network's size."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-3
    """The peak."""
    final_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of the peak, at ``total_tokens``."""
    warmup_tokens: Count = 0
    """Of the whole network; linear from zero."""
    total_tokens: Count = 0
    """When the rate reaches its final ratio, in tokens of the whole network; 0: a constant rate."""
    start_tokens: Count = 0
    """Where of this schedule version 0 stands: what it was trained on before there was a network,
    by the coordinator (``[warm_up]``) or elsewhere."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """From warm-up to ``total_tokens``: half a cosine, or warm-up, stable, decay: the peak until
    the last ``decay_share`` of the tokens, and a straight line down over those."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Of ``total_tokens``, with ``wsd``."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """AdamW's."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Decoupled; on matrices only."""
    clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Global gradient norm; 0 is no clipping."""
    max_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Optimizer steps of a lease at most: a longer one sums the gradients of several batches of
    ``micro_batch`` sequences before a step, if its recipe can (ADR 28). 0: a step of each batch."""
    rate_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A step of ``n`` batches has ``n`` to this power times the rate, which is that of one batch.
    0.5 is the square-root rule for Adam (arXiv 2205.10287); 0: one rate for all."""


class AdapterSpec(Message):
    """A run in which only low-rank matrices beside frozen weights are trained, and travel.

    LoRA (arXiv 2106.09685, section 4.1): a linear layer gives ``W x + (alpha / rank) B A x``.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0, le=65536, allow_inf_nan=False)]
    targets: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")], ...],
        Field(min_length=1, max_length=32),
    ]
    """Last part of the names of the layers that get one."""
    base: ArtifactRef
    """The frozen weights: dense, every parameter of the model. They never change."""
    base_dtype: Literal["float32", "bfloat16"]
    """In which ``base`` holds them."""

    @property
    def base_parameters(self) -> int:
        """How many weights are frozen (the header of ``base`` is not worth telling apart)."""
        return self.base.size_bytes // (4 if self.base_dtype == "float32" else 2)


class RunSpec(Message):
    """All that a node must know of a run, fixed for its life. The coordinator signs it."""

    run_id: RunId
    protocol: int = limits.PROTOCOL_VERSION
    model: ArtifactRef
    """The transformers config as JSON."""
    manifest: ArtifactRef
    """The parameter manifest (``manifest.py``)."""
    corpus: ArtifactRef
    """The corpus manifest (``corpus.py``)."""
    parameters: Count
    sequence_length: Annotated[int, Field(ge=2, le=2**20)]
    micro_batch: Annotated[int, Field(ge=1, le=4096)]
    """Sequences in one forward pass; in one inner step, too, unless ``inner.max_steps`` joins
    several."""
    inner: InnerSpec
    uplink: CodecSpec
    downlink: CodecSpec
    feedback_decay: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Decay of the node's error feedback (SparseLoCo, arXiv 2508.15706, algorithm 1)."""
    feedback_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of its error feedback that a node takes off the published weights before it trains,
    after many rounds (``schedule.feedback_share``, ADR 26): it goes on from part of what it has
    found and not sent, and does not find it again."""
    seed: Count = 0
    adapter: AdapterSpec | None = None
    """None: all parameters are trained. Else the manifest lists the adapters alone."""

    @property
    def model_parameters(self) -> int:
        """What a forward pass takes, trained or not; ``parameters`` are those that are trained."""
        return self.parameters + (self.adapter.base_parameters if self.adapter else 0)


MirrorUrl = Annotated[
    str,
    Field(
        max_length=limits.MAX_URL_CHARS,
        pattern=r"^https?://[A-Za-z0-9._~:\[\]-]{1,255}(/[A-Za-z0-9._~!$&'()*+,;=:%-]+)*/?$",
    ),
]
"""Where artifacts are, each under ``/ab/cdef…`` of its digest. No user, query or fragment."""


class MirrorList(Message):
    """Where artifacts may be fetched besides the coordinator; signed. The first is asked first."""

    run_id: RunId
    urls: Annotated[tuple[MirrorUrl, ...], Field(max_length=limits.MAX_MIRRORS)]
    issued_unix: Seconds


# Enrolment and admission ----------------------------------------------------------------------


class Capability(Message):
    """What a node measured of itself."""

    device: Annotated[str, Field(max_length=32)]
    """``cpu``, ``cuda``, ``mps``, ``xpu`` …"""
    device_name: Annotated[str, Field(max_length=128)]
    device_total_bytes: Count
    """Device memory, under the volunteer's cap."""
    device_free_bytes: Count
    host_total_bytes: Count
    """Host memory, under the cgroup's limit and the volunteer's cap."""
    host_free_bytes: Count
    disk_free_bytes: Count
    """Disk that the node's files may take, those that are there already among them, under the
    volunteer's cap."""
    cpu_count: Count
    torch_version: Annotated[str, Field(max_length=64)]
    talkoot_version: Annotated[str, Field(max_length=64)]
    device_physical_bytes: Count | None = None
    """Device memory without the volunteer's cap."""
    host_physical_bytes: Count | None = None
    """The same of the host."""
    disk_physical_bytes: Count | None = None
    """The same of the disk."""
    compute_capability: Annotated[str, Field(max_length=32)] = ""
    """``9.0`` of CUDA, ``gfx1100`` of ROCm; empty where there is no such thing."""
    bf16: bool = True
    """Whether the device has units for bf16; a CPU is asked for its speed, not for this."""
    driver: Annotated[str, Field(max_length=64)] = ""


class EnrolRequest(Message):
    """``POST /api/v1/enrol``. The CSR proves possession of the node's key."""

    protocol: int
    token: Annotated[str, Field(min_length=16, max_length=128)] | None
    """The invite's; without one the node asks to be let in, and waits for the operator."""
    csr_pem: Annotated[str, Field(max_length=limits.MAX_CSR)]
    name: Name
    capability: Capability


class EnrolReply(Message):
    """The node's certificate and where the rest of the coordinator is."""

    run_id: RunId
    node_id: NodeId
    certificate_pem: Pem
    trust: Signed
    """Signed TrustBundle: the CAs of this network."""
    coordinator_key_pem: Annotated[str, Field(max_length=4 * limits.KIB)]
    """Public key that signs runs, tasks, versions and trust."""
    transfer_port: Annotated[int, Field(ge=1, le=65535)]
    poll_seconds: Seconds


class TrustBundle(Message):
    """Which CAs stand for this network; signed. While one follows another there are two.

    It is signed with the coordinator's key, which a node holds since it enrolled: so it is believed
    wherever it comes from, and a node that was off for a whole rotation finds its way back.
    """

    run_id: RunId
    serial: Annotated[int, Field(ge=1, lt=2**63)]
    """Rises with every change: a node that has seen a higher one refuses a lower."""
    authorities: Annotated[tuple[Pem, ...], Field(min_length=1, max_length=limits.MAX_AUTHORITIES)]
    issued_unix: Seconds


class RenewRequest(Message):
    """A node asks for a new certificate, signed with the key that it enrolled with."""

    run_id: RunId
    node_id: NodeId
    csr_pem: Annotated[str, Field(max_length=limits.MAX_CSR)]
    """Fresh, for the same key."""
    issued_unix: Seconds


class RenewReply(Message):
    """The new certificate, and the CAs to trust from now on."""

    certificate_pem: Pem
    trust: Signed


class CoordinatorInfo(Message):
    """``GET /api/v1/info``: readable by anybody, of any protocol version."""

    protocol: int
    talkoot_version: Annotated[str, Field(max_length=64)]
    ca_fingerprint: Digest


class Refusal(Message):
    """The body of every answer that is not a success."""

    code: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    sentence: Sentence


class ProofChallenge(Message):
    """What a node must prove itself on; fresh for every proof."""

    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    steps: Annotated[int, Field(ge=1, le=64)]


class Proof(Message):
    """Real training steps, measured. Sent signed over the data plane."""

    run_id: RunId
    node_id: NodeId
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """The coordinator's challenge: it seeds the weights and the tokens of the proof's steps."""
    recipe: Annotated[str, Field(max_length=64)]
    steps: Annotated[int, Field(ge=1, le=64)]
    loss: Finite
    """Mean loss over the steps, which the coordinator can recompute for a small model."""
    sketch: Annotated[tuple[Finite, ...], Field(max_length=64)] = ()
    """Fingerprint of what the steps changed (``proof.py``): recomputed as the loss is."""
    peak_bytes: Count
    """Peak device memory of the steps (on a CPU node: of the training process)."""
    predicted_bytes: Count
    tokens_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    capability: Capability


class Verdict(Message):
    """An answer with its reason: admission, acceptance, refusal."""

    accepted: bool
    code: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    sentence: Sentence


# A round ----------------------------------------------------------------------


class VersionRef(Message):
    """A published version, and two ways there: by updates, or from a checkpoint.

    The updates begin before the checkpoint, so that a node that keeps up never fetches one.
    """

    version: Count
    weights_digest: Digest
    checkpoint_version: Count
    checkpoint: ArtifactRef
    """Dense weights of ``checkpoint_version`` <= ``version``."""
    updates_from: Count
    """The version that the first update changes, <= ``checkpoint_version``."""
    updates: Annotated[tuple[ArtifactRef, ...], Field(max_length=limits.MAX_UPDATE_CHAIN)]
    """Updates for ``updates_from + 1 … version``, in order."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.updates_from <= self.checkpoint_version <= self.version:
            raise ValueError("the checkpoint lies outside the chain")
        if self.version - self.updates_from != len(self.updates):
            raise ValueError("the chain of updates is not whole")
        return self


class VersionStatement(Message):
    """What is published, for a node that is behind; signed."""

    run_id: RunId
    generation: Count
    ref: VersionRef
    issued_unix: Seconds
    expires_unix: Seconds


class Head(Message):
    """Where the run stands; signed anew every minute.

    It is what TUF calls a timestamp: small, short-lived, and in every answer to a report, so that
    a node which is kept on an old version, or is told of another one than its neighbours, knows.
    """

    run_id: RunId
    generation: Count
    """Of the coordinator's state: it rises when a backup is restored, and only then may a run go
    back."""
    version: Count
    weights_digest: Digest
    trust_serial: Count
    """Of the newest TrustBundle."""
    issued_unix: Seconds
    expires_unix: Seconds


class BlockRef(Message):
    """One block of one epoch."""

    epoch: Count
    block: Annotated[int, Field(ge=0, lt=limits.MAX_BLOCKS)]


class Lease(Message):
    """Blocks and a token budget for one node in one round."""

    lease_id: LeaseId
    run_id: RunId
    round: Count
    attempt: Count
    node_id: NodeId
    blocks: Annotated[tuple[BlockRef, ...], Field(min_length=1, max_length=limits.MAX_LEASE_BLOCKS)]
    tokens: Annotated[int, Field(ge=1, lt=2**48)]


class RoundTask(Message):
    """What the coordinator asks of one node; signed. Fits one control message."""

    run_id: RunId
    generation: Count
    """As in :class:`Head`."""
    round: Count
    lease: Lease
    base: VersionRef
    """Train from here."""
    tokens_before: Count
    """Tokens that the whole network had learned from when the round opened: where the schedule is.
    Those of contributions that were set aside are not among them."""
    tokens_round: Count
    """Tokens that all leases of this round hold together."""
    fresh_state: bool = False
    """Train with empty optimizer moments and no error feedback, so that whoever has the base and
    the blocks can repeat the lease. What the node held back is kept for its next lease."""
    issued_unix: Seconds
    deadline_unix: Seconds
    """When the round closes, if its quorum is there."""
    expires_unix: Seconds
    """Not to be begun after this."""
    poll_seconds: Seconds


class Contribution(Message):
    """A node's claim about its work; signed. The payload itself is pushed over the data plane."""

    run_id: RunId
    round: Count
    lease_id: LeaseId
    node_id: NodeId
    base_weights_digest: Digest
    payload: ArtifactRef
    tokens: Annotated[int, Field(ge=1, lt=2**48)]
    steps: Annotated[int, Field(ge=1, lt=2**31)]
    loss: Finite
    """Mean training loss over the lease."""
    training_seconds: Seconds


class NodeReport(Message):
    """A node's heartbeat on the data plane: what it is doing now."""

    state: Literal["idle", "syncing", "proving", "training", "pushing", "paused", "leaving"]
    version: Count | None
    weights_digest: Digest | None
    """Of ``version``, as last computed by the node."""
    lease_id: LeaseId | None
    step: Count
    steps: Count
    loss: Finite | None
    tokens_per_second: Seconds
    bytes_up: Count
    """Data-plane bytes sent since enrolment."""
    bytes_down: Count
    healed: Count
    """How often the node found its replica wrong and fetched a checkpoint anew."""
    started_unix: Seconds
    """When this daemon process started: a change is a restart."""
    recipe: Annotated[str, Field(max_length=64)] | None = None
    """How it holds its replica."""
    falls: Count = 0
    """How often memory ran out and a smaller recipe took over."""
    link_down: Seconds | None = None
    """Bytes a second from the coordinator, of the last transfer that was worth timing."""
    link_up: Seconds | None = None
    """The same to the coordinator."""


class NodeReportReply(Message):
    """What the coordinator answers to a report."""

    status: Literal["pending", "proving", "admitted", "quarantined", "refused", "banned"]
    sentence: Sentence
    report_seconds: Seconds
    poll_seconds: Seconds
    latest_version: Count | None
    run_finished: bool
    lease_open: bool
    """Whether the lease named in the report can still be committed."""
    head: Signed
    """Signed Head."""
    latest: Signed | None
    """Signed VersionStatement, when the node is behind and holds no lease: it may catch up
    meanwhile."""
