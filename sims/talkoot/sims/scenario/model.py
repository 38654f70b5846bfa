"""A scenario: one TOML file that both engines read, validated whole.

Rules are the operator's own configuration (``talkoot.server.config``): what is tried here can be
copied into a ``config.toml``. Every number that has a unit says it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from talkoot.protocol.limits import GIB
from talkoot.protocol.messages import CodecSpec, InnerSpec
from talkoot.server.config import (
    AdmissionSection,
    BeliefSection,
    Config,
    CorpusSection,
    DownlinkSection,
    EvaluationSection,
    ModelSection,
    NetworkSection,
    RoundSection,
    RunSection,
)
from talkoot.server.outer import OuterSpec
from talkoot.server.robust import AggregationSpec
from talkoot.sims.scenario.devices import DEVICES, LINKS, Device, Link
from talkoot.sims.scenario.expect import METRICS

AttackKind = Literal[
    "sign flip",
    "scaling",
    "noise",
    "label flips",
    "copy",
    "lazy zero",
    "backdoor",
    "colluding",
    "sybil wave",
    "longest leases",
    "huge and tiny tensors",
    "NaN",
]
"""The kinds of ``talkoot.sims.attacks.kinds`` (a test holds that they are the same)."""
MAX_NODES: Final = 1_000_000
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Word = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CorpusPart(CorpusSection):
    """The operator's ``[corpus]``, and how much text the planner takes it for."""

    tokens: Annotated[int, Field(ge=16)] | None = None
    """In the training part; the planner reads no text. None: as much as is asked for."""


class Rules(_Part):
    """The sections of an operator's configuration that change how the network behaves."""

    round: RoundSection = RoundSection()
    inner: InnerSpec = InnerSpec()
    outer: OuterSpec = OuterSpec()
    uplink: CodecSpec = CodecSpec()
    downlink: DownlinkSection = DownlinkSection()
    feedback_decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of what a node did not send, from round to round."""
    feedback_start: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Share of it that a node starts from, after many rounds."""
    admission: AdmissionSection = AdmissionSection()
    aggregation: AggregationSpec = AggregationSpec()
    belief: BeliefSection = BeliefSection()
    evaluation: EvaluationSection = EvaluationSection()


class DevicePart(_Part):
    """A device that the library does not have: ``[devices.NAME]``."""

    kind: Literal["cuda", "cpu", "mps", "xpu"] = "cuda"
    """As torch names it."""
    memory_gib: Positive
    """On the device, in GiB."""
    host_gib: Positive = 32.0
    """Beside it, in GiB."""
    teraflops: Positive
    """Dense matrix products with fp32 sums, 1e12 a second."""
    efficiency: Annotated[float, Field(gt=0, le=1)] = 0.40
    """Of that, in training."""
    watts: NotNegative = 0.0
    """At full load."""
    source: str
    """Where these numbers come from."""

    def device(self) -> Device:
        """As the library holds it."""
        return Device(
            self.kind,
            round(self.memory_gib * GIB),
            round(self.host_gib * GIB),
            self.teraflops,
            self.watts,
            self.source,
            self.efficiency,
        )


class Population(_Part):
    """Nodes of one class: ``[[population]]``."""

    name: Word
    device: str
    """One of ``talkoot-sim scenarios --devices``, or of ``[devices]``."""
    link: str = "fibre-300"
    """One of ``talkoot-sim scenarios --devices``; the keys below win over it."""
    count: Annotated[int, Field(ge=0, le=MAX_NODES)]
    """Nodes at the beginning."""
    recipe: str | None = None
    """None: the fastest that fits."""
    memory_gib: Positive | None = None
    """Of the device, that the volunteer gives; None is all."""
    host_gib: Positive | None = None
    """Of the host, that the volunteer gives; None is all."""
    disk_gib: Positive = 500.0
    """Free."""
    tokens_per_second: Positive | None = None
    """Measured; None derives it from the device's throughput and the model's size."""
    speed_spread: Annotated[float, Field(ge=0, le=2)] = 0.1
    """Between nodes of the class: standard deviation of the logarithm of their speed."""
    speed_noise: Annotated[float, Field(ge=0, le=1)] = 0.03
    """The same for one node from round to round: what else its owner does."""
    up_mbit: Positive | None = None
    down_mbit: Positive | None = None
    latency_ms: NotNegative | None = None
    hours: Annotated[
        tuple[Annotated[tuple[NotNegative, NotNegative], Field(strict=False)], ...],
        Field(strict=False, max_length=24),
    ] = ((0, 24),)
    """Of the local day, when a node is on: ``[[18, 24]]``, or ``[[22, 7]]`` across midnight."""
    time_zones: Annotated[
        tuple[Annotated[float, Field(ge=-12, le=14)], ...],
        Field(strict=False, min_length=1, max_length=64),
    ] = (0.0,)
    """Hours ahead of UTC; nodes are spread evenly over them."""
    drops_per_day: Annotated[float, Field(ge=0, le=1440)] = 0.0
    """How often a node goes away without a word, while it is on."""
    drop_minutes: Positive = 30.0
    """For how long, on average (exponentially distributed)."""
    watts: NotNegative | None = None
    """Drawn when training; None takes the device's."""
    idle_watts: NotNegative = 0.0
    """Drawn beyond what the machine draws anyway, when it waits."""
    price_per_kwh: NotNegative = 0.30
    """Of energy, in the scenario's currency."""

    @model_validator(mode="after")
    def _hours_in_a_day(self) -> Self:
        for begin, end in self.hours:
            if begin >= 24 or end > 24 or begin == end:
                raise ValueError(f"hours [{begin:g}, {end:g}] are not a part of a day of 24")
        return self


class CoordinatorPart(_Part):
    """The operator's machine and what stands in front of it."""

    up_mbit: Positive = 1000.0
    """Egress of its line."""
    down_mbit: Positive = 1000.0
    """Ingress of its line."""
    mirrors: Annotated[int, Field(ge=0, le=1000)] = 0
    """Web servers that hold artifacts; nodes ask them first."""
    mirror_up_mbit: Positive = 1000.0
    """Egress of each."""
    cores: Annotated[int, Field(ge=1, le=1024)] = 4
    """Of its machine: contributions are verified and decoded on all of them."""
    aggregate_seconds_per_contribution: NotNegative | None = None
    """None: by the model's size."""
    publish_seconds: NotNegative | None = None
    """The outer step, encoding and hashing. None: by the model's size."""
    price_per_egress_gb: NotNegative = 0.0
    """In the scenario's currency, per 1e9 bytes; mirrors' too."""


class Attackers(_Part):
    """Nodes that lie: ``[[attackers]]``."""

    kind: AttackKind
    count: Annotated[int, Field(ge=1, le=MAX_NODES)] | None = None
    """So many of the nodes; or ``share``."""
    share: Share | None = None
    """Of the nodes there at the beginning; or ``count``."""
    from_round: Annotated[int, Field(ge=1)] = 1
    """Before it they are as good as anybody."""
    population: str | None = None
    """Among nodes of this class only."""

    @model_validator(mode="after")
    def _how_many(self) -> Self:
        if (self.count is None) == (self.share is None):
            raise ValueError("give exactly one of count and share")
        return self


class Event(_Part):
    """Something that happens: ``[[events]]``, at a round's opening or at a time."""

    round: Annotated[int, Field(ge=1)] | None = None
    """A second after this round opens, when leases are out; or ``day``."""
    day: NotNegative | None = None
    """Days after the beginning; or ``round``."""
    leave: Share | None = None
    """Share of the nodes that goes."""
    join: Annotated[int, Field(ge=1, le=MAX_NODES)] | None = None
    """So many nodes of ``population`` come."""
    outage_minutes: Positive | None = None
    """The coordinator is away for so long."""
    population: str | None = None
    """With ``join``; with ``leave`` only nodes of this class go."""
    back_after_hours: Positive | None = None
    """With ``leave``: when they come back; None is never."""

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if (self.round is None) == (self.day is None):
            raise ValueError("give exactly one of round and day")
        if sum(x is not None for x in (self.leave, self.join, self.outage_minutes)) != 1:
            raise ValueError("give exactly one of leave, join and outage_minutes")
        if self.join is not None and self.population is None:
            raise ValueError("join needs population, the class that comes")
        if self.back_after_hours is not None and self.leave is None:
            raise ValueError("back_after_hours goes with leave")
        return self


class Expected(_Part):
    """Bounds of one figure."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if (self.min or -math.inf) > (self.max if self.max is not None else math.inf):
            raise ValueError("min is above max")
        return self


@dataclass(frozen=True)
class NodeClass:
    """A population with all names looked up and all defaults filled in."""

    population: Population
    device: Device
    link: Link
    tokens_per_second: float
    """Of the fastest recipe, or as the scenario says."""

    @property
    def name(self) -> str:
        """Of the population."""
        return self.population.name

    @property
    def watts(self) -> float:
        """Drawn when training."""
        given = self.population.watts
        return self.device.watts if given is None else given


class Scenario(_Part):
    """The whole file. ``name``, ``[model]`` and ``[[population]]`` have no default."""

    name: Word
    sentence: str = ""
    """What it is about, for people."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The same seed gives the same figures, and the same weights."""
    rounds: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """After so many it ends; or ``days``, or whichever comes first."""
    days: Annotated[float, Field(gt=0, le=3650)] | None = None
    """After so much virtual time it ends."""
    target_tokens: Annotated[int, Field(ge=1)] | None = None
    """How long it takes to train on so many is answered, too."""
    currency: Annotated[str, Field(max_length=8)] = "EUR"
    """Of all prices; a word only."""
    model: ModelSection
    corpus: CorpusPart = CorpusPart()
    rules: Rules = Rules()
    coordinator: CoordinatorPart = CoordinatorPart()
    devices: dict[Word, DevicePart] = {}
    population: Annotated[tuple[Population, ...], Field(strict=False, min_length=1, max_length=256)]
    attackers: Annotated[tuple[Attackers, ...], Field(strict=False, max_length=64)] = ()
    events: Annotated[tuple[Event, ...], Field(strict=False, max_length=1000)] = ()
    expect: dict[str, Expected] = {}
    """By figure: what must hold, or the command's exit status is not zero."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.rounds is None and self.days is None:
            raise ValueError("give rounds, days or both: a simulation must end")
        for place, entry in enumerate(self.population):
            where = f"population.{place}"
            _known(entry.device, [*self.devices, *DEVICES], f"{where}.device", "device")
            _known(entry.link, list(LINKS), f"{where}.link", "link")
            if entry.recipe is not None:
                from talkoot.protocol.recipes import RECIPES

                _known(entry.recipe, list(RECIPES), f"{where}.recipe", "recipe")
        names = [entry.name for entry in self.population]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise LocatedError(f"population.{place}.name", f"{name!r} is there twice")
        among = {f"attackers.{n}": one.population for n, one in enumerate(self.attackers)}
        among |= {f"events.{n}": one.population for n, one in enumerate(self.events)}
        for where, chosen in among.items():
            if chosen is not None:
                _known(chosen, names, f"{where}.population", "population")
        for name in self.expect:
            _known(name, list(METRICS), f"expect.{name}", "figure")
        if sum(entry.count for entry in self.population) > MAX_NODES:
            raise LocatedError("population", f"more than {MAX_NODES} nodes")
        self.config()
        return self

    @classmethod
    def load(cls, name: str | Path, overrides: Mapping[str, object] | None = None) -> Scenario:
        """A scenario by path or library name; ``overrides`` such as ``{"seed": 1}``.

        Raises:
            ConfigError: it is not there, or one sentence about what is wrong, with key and line.
        """
        from talkoot.sims.scenario.load import load_scenario

        return load_scenario(name, overrides)

    @property
    def nodes(self) -> int:
        """At the beginning."""
        return sum(entry.count for entry in self.population)

    def config(self) -> Config:
        """The operator's configuration of this network."""
        corpus = {key: getattr(self.corpus, key) for key in CorpusSection.model_fields}
        return Config(
            run=RunSection(name=self.name, seed=self.seed, rounds=self.rounds or 10_000_000),
            model=self.model,
            corpus=CorpusSection(**corpus),
            network=NetworkSection(bind="127.0.0.1"),
            **{key: getattr(self.rules, key) for key in Rules.model_fields},
        )

    def classes(self, parameters: int) -> tuple[NodeClass, ...]:
        """The populations with all names looked up, for a model of so many parameters."""
        return tuple(self._class(entry, parameters) for entry in self.population)

    def _class(self, entry: Population, parameters: int) -> NodeClass:
        own = self.devices.get(entry.device)
        device = DEVICES[entry.device] if own is None else own.device()
        line = LINKS[entry.link]
        link = Link(
            line.up_mbit if entry.up_mbit is None else entry.up_mbit,
            line.down_mbit if entry.down_mbit is None else entry.down_mbit,
            line.latency_ms if entry.latency_ms is None else entry.latency_ms,
            line.source,
        )
        speed = entry.tokens_per_second
        return NodeClass(
            entry, device, link, device.tokens_per_second(parameters) if speed is None else speed
        )


class LocatedError(ValueError):
    """A fault that a check of the whole file found at one key."""

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(sentence)
        self.key = key


def _known(name: str, names: list[str], key: str, what: str) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
    raise LocatedError(key, f"there is no {what} {name!r}; {hint}")
