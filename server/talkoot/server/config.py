"""The operator's configuration: one TOML file, validated whole, with sentences for errors.

Every number that has a unit says it. A key that is not here is an error, and so is a value that
cannot work; nothing is silently ignored.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from talkoot.protocol import limits
from talkoot.protocol.errors import ConfigError
from talkoot.protocol.messages import CodecSpec, InnerSpec, MirrorUrl
from talkoot.server.outer import OuterSpec
from talkoot.server.robust import AggregationSpec

Port = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunSection(_Section):
    """What is trained, for how long."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = "talkoot"
    """The run's id begins with it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of initial weights, held-out split and order of blocks."""
    rounds: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    """After so many the run is finished."""


class ModelSection(_Section):
    """The model: exactly one of ``preset``, ``config`` and ``pretrained``."""

    preset: str | None = None
    """A built-in model with fresh weights (``talkoot.protocol.model.PRESETS``)."""
    config: str | None = None
    """A transformers config.json: a model with fresh weights."""
    pretrained: str | None = None
    """A directory that ``AutoModelForCausalLM.from_pretrained`` loads."""
    sequence_length: Annotated[int, Field(ge=2, le=2**20)] = 2048
    """Must divide ``corpus.block_tokens``."""
    micro_batch: Annotated[int, Field(ge=1, le=4096)] = 1
    """Sequences in one forward pass, the same on every node; in one inner step, too, unless
    ``inner.max_steps`` joins several."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(x is not None for x in (self.preset, self.config, self.pretrained)) != 1:
            raise ValueError("give exactly one of preset, config and pretrained")
        return self


class AdapterSection(_Section):
    """An adapter run (LoRA): small matrices beside the frozen weights of ``model.pretrained`` are
    all that is trained and all that travels."""

    rank: Annotated[int, Field(ge=0, le=1024)] = 0
    """Of the matrices; 0 is an ordinary run, which trains every parameter."""
    alpha: Annotated[float, Field(gt=0, le=65536)] = 32.0
    """The matrices' product counts this over ``rank`` times."""
    targets: Annotated[tuple[str, ...], Field(min_length=1, max_length=32, strict=False)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """The linear layers that get one, by the last part of their names."""
    base_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """In which every node gets the frozen weights, once."""


class TokenizerSection(_Section):
    """Bytes, or any tokenizer that ``transformers.AutoTokenizer`` loads from a directory."""

    kind: Literal["bytes", "hf"] = "bytes"
    """``bytes``: one token a UTF-8 byte. ``hf``: the tokenizer at ``path``."""
    path: str | None = None
    """Its directory, which ``init`` copies; with ``hf`` only."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        if (self.kind == "hf") != (self.path is not None):
            raise ValueError("path goes with kind = 'hf', and only with it")
        return self


class CorpusSection(_Section):
    """Where the text comes from."""

    sources: Annotated[tuple[str, ...], Field(min_length=1, max_length=64, strict=False)] = (
        "stdlib",
    )
    """``stdlib``, a file, a folder, or ``hf:NAME[:split[:column]]``."""
    block_tokens: Annotated[int, Field(ge=16, le=limits.MAX_BLOCK // 4)] = 65_536
    """Tokens in the smallest piece of data that is leased."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of documents that is never trained on."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    """Of files; those that are not text in it are passed over."""


class RoundSection(_Section):
    """When a round opens and closes."""

    tokens_per_node: Annotated[int, Field(ge=1, lt=2**40)] = 1_048_576
    """Tokens in the lease of a node of median speed; others get more or less."""
    largest_lease: Annotated[float, Field(ge=1, le=1000)] = 4.0
    """Times the median node's lease: what faster nodes get at most, however fast they are measured.
    One that could do more waits for the others."""
    deadline_seconds: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600.0
    """From opening to closing, if not everybody has answered before."""
    quorum: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Contributions without which a round is not closed."""
    min_nodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Admitted nodes online without which a round is not opened."""
    close_at_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of a round's tokens within reach, whose arrival closes it before its deadline once the quorum
    is there; at 1 it waits for all. What comes later is refused, and kept as error feedback."""
    lost_after_seconds: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """A node that has not reported for so long is not waited for (until it reports again)."""
    max_behind: Annotated[int, Field(ge=1, le=limits.MAX_UPDATE_CHAIN)] = 4
    """Versions that a node may lack and still be leased; one that lacks more catches up first."""
    checkpoint_every: Annotated[int, Field(ge=1, le=200)] = 10
    """Rounds between dense checkpoints, for those who join."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=1000)] = 2
    """How many of those to keep; older ones go an hour after nothing refers to them."""


class DownlinkSection(CodecSpec):
    """The codec of published updates: denser than the uplink's."""

    keep: Annotated[int, Field(ge=1, le=limits.MAX_CHUNK)] = 256
    value_bits: Annotated[int, Field(ge=2, le=limits.MAX_VALUE_BITS)] = 4


class NetworkSection(_Section):
    """Addresses. Port 0 is "any free one", chosen at ``init``."""

    bind: str = "0.0.0.0"  # noqa: S104 - volunteers connect from anywhere
    """The address that both public ports listen on."""
    public_host: str = "127.0.0.1"
    """The name or address that invites carry."""
    gateway_port: Port = 7443
    """TCP, HTTPS: must be reachable from outside."""
    transfer_port: Port = 7444
    """TCP, gRPC: must be reachable from outside."""
    superlink_port: Port = 0
    """Bound to 127.0.0.1 always: nobody but the coordinator talks to the SuperLink directly."""
    max_pulls_per_second: Annotated[float, Field(gt=0)] = 20.0
    """What all nodes together may poll. One costs gateway and SuperLink 27 ms of a core, so that
    two cores bear some 70 when nothing else runs; 2,000 nodes then poll every 100 s."""
    min_poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.25
    """How often a node of a small network polls."""
    max_connections: Annotated[int, Field(ge=8, le=100_000)] = 8192
    """Open connections that each public port bears."""
    max_connections_per_address: Annotated[int, Field(ge=2, le=100_000)] = 64
    """Of them from one address (IPv6: from one /64); a node keeps two or three a port."""


class AdmissionSection(_Section):
    """Who may train."""

    enrolment: Literal["invite", "open"] = "invite"
    """``open``: who has no invite may ask, and waits for ``nodes approve``."""
    queue: Annotated[int, Field(ge=1, le=100_000)] = 200
    """With ``open``: how many may wait at once."""
    queue_per_address: Annotated[int, Field(ge=1, le=100_000)] = 4
    """How many of them from one address (IPv6: from one /64)."""
    applications_per_hour: Annotated[int, Field(ge=1, le=1_000_000)] = 120
    """New ones from everywhere together."""
    certificate_days: Annotated[float, Field(gt=0, le=825)] = 30.0
    """Of a node; it renews itself in the last third."""
    approve: Literal["auto", "manual"] = "auto"
    """``manual``: a node with a good proof waits for ``nodes approve``."""
    memory_margin: Annotated[float, Field(ge=1, le=4)] = 1.05
    """Predicted memory times this must fit into what the node has."""
    check_proof_up_to_parameters: Annotated[int, Field(ge=0)] = 50_000_000
    """Up to this size the coordinator recomputes the proof's loss itself."""
    proof_loss_tolerance: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Relative; devices and dtypes differ a little."""


class BeliefSection(_Section):
    """Whose work counts, and how much is looked into (docs/trust.md)."""

    probation_contributions: Annotated[int, Field(ge=1, le=10_000)] = 3
    """Contributions of a newcomer that must count before it is established."""
    probation_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of a round's weight, for all nodes on probation together, once anybody is established."""
    set_aside_below: Annotated[float, Field(ge=0, le=1)] = 0.12
    """A contribution with less than this of the usual agreement does not count; 0 is off."""
    largest_norm_ratio: Annotated[float, Field(gt=1, le=1e6)] = 20.0
    """A contribution so many times louder than usual is refused."""
    quarantine: bool = True
    """Whether enough evidence shuts a node out of rounds; if not, it is only shown."""
    fresh_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of leases that begin from fresh optimizer state, so that they can be replayed. A node's first
    one always does. At 1 everything can be checked, and training is a little slower."""
    replay_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of leases with fresh state, how many the coordinator trains again and compares."""
    gain_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of contributions, how many the coordinator tries alone on assigned and on other blocks."""
    gain_share_probation: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The same for nodes on probation."""
    validate_up_to_parameters: Annotated[int, Field(ge=0)] = 50_000_000
    """Larger models are not validated on the coordinator's device, whatever the shares say."""
    wait_seconds: Annotated[float, Field(ge=0, le=86400)] = 0.0
    """The longest that a round which could close waits for validations of its contributions; later
    ones still count for their nodes."""


class WarmUpSection(_Section):
    """Version 0 trained by the coordinator itself, in ``init``. The first steps of a model move all
    of it, which a few values a round cannot tell: a young network is behind one node alone."""

    tokens: Annotated[int, Field(ge=0, le=2**40)] = 0
    """To train on, while the inner rate rises from 0 to its peak; the network then begins at the
    end of ``inner.warmup_tokens``. 0: version 0 is the model as it is."""
    recipe: str = "fp32-adamw"
    """How the model is held meanwhile (recipes.md)."""
    device: str = "cpu"
    """A torch device of the coordinator's machine."""


class EvaluationSection(_Section):
    """Held-out loss of published versions, measured beside the rounds at the lowest priority."""

    every: Annotated[int, Field(ge=0, le=10_000_000)] = 1
    """Rounds between measured versions; versions that come faster are passed over. 0: never."""
    tokens: Annotated[int, Field(ge=1, le=2**32)] = 32_768
    """Held-out tokens to look at, in equal parts from each source."""
    device: str = "cpu"
    """A torch device of the coordinator's machine."""


class LedgerSection(_Section):
    """Where the ledger is: empty for SQLite in the state directory, or an SQLAlchemy URL."""

    url: str = ""
    """Such as ``postgresql+psycopg://user@host/talkoot`` (with ``talkoot[postgres]``)."""


class StoreSection(_Section):
    """A second home for artifacts, which a process of its own copies to while rounds go on."""

    url: str = ""
    """Such as ``s3://bucket/prefix``, ``gs://…``, ``az://…`` or ``file:///directory`` (with
    ``talkoot[store]``); empty for none. Credentials come from the environment."""
    endpoint: str = ""
    """Of an S3-like server that is not Amazon's: ``https://host:port``."""
    region: str = ""
    """Of the bucket, when the server wants to know."""
    blocks: bool = True
    """Copy the corpus's blocks, too."""
    max_rate: Annotated[float, Field(gt=0)] | None = None
    """Bytes per second that copying may use of the line; none is no limit."""
    keep_days: Annotated[float, Field(ge=1)] | None = None
    """Checkpoints and updates that nothing refers to any more are deleted there so long after they
    were copied; none keeps them for ever. Not for a prefix that several networks share."""


class MirrorsSection(_Section):
    """Where nodes fetch artifacts before they ask the coordinator."""

    urls: Annotated[tuple[MirrorUrl, ...], Field(max_length=limits.MAX_MIRRORS, strict=False)] = ()
    """``https://…`` or ``http://…``, asked in this order: a bucket's public address, a CDN, or any
    web server over a copy of ``store/``."""


class Config(_Section):
    """The whole file. Only ``[model]`` has no default."""

    run: RunSection = RunSection()
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    tokenizer: TokenizerSection = TokenizerSection()
    corpus: CorpusSection = CorpusSection()
    round: RoundSection = RoundSection()
    inner: InnerSpec = InnerSpec()
    warm_up: WarmUpSection = WarmUpSection()
    outer: OuterSpec = OuterSpec()
    uplink: CodecSpec = CodecSpec()
    downlink: DownlinkSection = DownlinkSection()
    feedback_decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of what a node did not send, from round to round (its error feedback)."""
    feedback_start: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Share of its error feedback that a node takes off the published weights before it trains: it
    goes on from part of what it has found and not sent, and does not find it again. Nothing in
    round 1, half as much in round 51, nearly all after hundreds."""
    network: NetworkSection = NetworkSection()
    admission: AdmissionSection = AdmissionSection()
    aggregation: AggregationSpec = AggregationSpec()
    belief: BeliefSection = BeliefSection()
    evaluation: EvaluationSection = EvaluationSection()
    ledger: LedgerSection = LedgerSection()
    store: StoreSection = StoreSection()
    mirrors: MirrorsSection = MirrorsSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.corpus.block_tokens % self.model.sequence_length:
            raise ValueError(
                f"corpus.block_tokens ({self.corpus.block_tokens}) must be a multiple of "
                f"model.sequence_length ({self.model.sequence_length})"
            )
        if self.adapter.rank and self.model.pretrained is None:
            raise ValueError(
                "adapter.rank is set and model.pretrained is not: adapters are trained beside the "
                "weights of a pretrained model; name its directory"
            )
        if self.warm_up.tokens and self.adapter.rank:
            raise ValueError(
                "warm_up.tokens and adapter.rank are both set: adapters begin beside trained "
                "weights and need no warm-up; leave warm_up.tokens out"
            )
        if self.round.tokens_per_node > limits.MAX_LEASE_BLOCKS * self.corpus.block_tokens:
            raise ValueError(
                f"round.tokens_per_node ({self.round.tokens_per_node}) needs more than "
                f"{limits.MAX_LEASE_BLOCKS} blocks: raise corpus.block_tokens to at least "
                f"{-(-self.round.tokens_per_node // limits.MAX_LEASE_BLOCKS)}"
            )
        if self.round.quorum > self.round.min_nodes:
            raise ValueError(
                f"round.quorum ({self.round.quorum}) is larger than round.min_nodes "
                f"({self.round.min_nodes}): a round could open that can never close"
            )
        return self


def _known_keys(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        annotation: Any = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _sentence(err: ValidationError, where: str) -> str:
    first = err.errors(include_url=False)[0]
    loc = tuple(str(part) for part in first["loc"])
    key = ".".join(loc) or "the file"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], _known_keys(Config, loc[:-1]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
        return f"{where}: unknown key {key!r}{hint}"
    if first["type"] == "missing":
        return f"{where}: {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] == "value_error" else f" (it is {first['input']!r})"
    return f"{where}: {key}: {message}{shown}"


def parse_config(text: str, *, where: str = "config.toml") -> Config:
    """Read a configuration. Raises :class:`ConfigError` with one sentence."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{where} is not valid TOML: {err}.") from err
    try:
        return Config.model_validate(data)
    except ValidationError as err:
        raise ConfigError(_sentence(err, where) + ".") from err


def override_config(config: Config, values: Mapping[str, object]) -> Config:
    """``config`` with other values for some keys, such as ``{"outer.learning_rate": 1.5}``.

    Raises :class:`ConfigError` as :func:`parse_config` does.
    """
    data = config.model_dump(mode="json", exclude_none=True)
    for key, value in values.items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: {part!r} is a value and not a section.")
        section[last] = value
    try:
        return Config.model_validate(data)
    except ValidationError as err:
        raise ConfigError(_sentence(err, ", ".join(values)) + ".") from err


def begun(config: Config) -> InnerSpec:
    """The run's inner optimizer, from where version 0 stands in the schedule."""
    inner = config.inner
    if not config.warm_up.tokens:
        return inner
    return inner.model_copy(update={"start_tokens": max(inner.start_tokens, inner.warmup_tokens)})


def load_config(path: Path) -> Config:
    """Read a configuration from a file. Raises :class:`ConfigError` with one sentence."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ConfigError(f"There is no configuration at {path}.") from err
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} cannot be read as text: {err}.") from err
    return parse_config(text, where=str(path))


def dump_config(config: Config) -> str:
    """The whole configuration as TOML, defaults included: what ``init`` leaves for the operator."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
