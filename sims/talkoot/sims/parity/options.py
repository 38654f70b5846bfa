"""What is compared: a base configuration, arms that change some of its keys, and seeds. Pure."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.messages import Message
from talkoot.server.config import Config, begun, override_config

Kind = Literal["one", "ddp", "net"]


class Nodes(Message):
    """What the nodes of an arm are like; lists are gone round, node by node."""

    speeds: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Relative tokens a second."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of rounds that a node misses."""
    recipes: tuple[str, ...] = ("fp32-adamw",)
    """How replicas are held (``talkoot.protocol.recipes``)."""
    own_text: bool = False
    """Each node trains on one of the corpus's sources only."""


@dataclass(frozen=True)
class Arm:
    """A network to be measured: the base configuration with other values for some keys."""

    name: str
    values: tuple[tuple[str, object], ...] = ()
    """Keys of the operator's configuration."""
    nodes: Nodes = field(default_factory=Nodes)

    def config(self, base: Config, seed: int) -> Config:
        """The whole configuration of this arm for one seed."""
        return override_config(base, {**dict(self.values), "run.seed": seed})


def parse_arm(text: str) -> Arm:
    """``outer.learning_rate=1.5,uplink.keep=128`` as an arm.

    Keys are those of the operator's configuration, or ``nodes.…`` (see :class:`Nodes`), or
    ``name``. Values are TOML; what is no TOML is a string.

    Raises:
        ConfigError: not ``key=value``, or an impossible value for a node.
    """
    values: dict[str, object] = {}
    for part in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", text):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"The arm {text!r}: {part!r} is not key=value.")
        values[key.strip()] = _value(value.strip())
    name = str(values.pop("name", text))
    nodes = {key[6:]: values.pop(key) for key in list(values) if key.startswith("nodes.")}
    try:
        made = Nodes.model_validate_json(json.dumps(nodes))
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ".".join(("nodes", *(str(part) for part in first["loc"])))
        raise ConfigError(f"The arm {text!r}: {where}: {first['msg']}.") from err
    return Arm(name, tuple(sorted(values.items())), made)


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


@dataclass(frozen=True)
class ParityOptions:
    """All that decides the result."""

    base: Config
    arms: tuple[Arm, ...]
    nodes: int = 8
    rounds: int = 100
    """Of the base configuration; an arm whose rounds hold other amounts gets as many tokens."""
    seeds: tuple[int, ...] = (0, 1, 2)
    heldout_tokens: int = 32_768
    out: Path = Path("runs/parity")
    work: Path | None = None
    """Where the arms' files are while they run; ``out`` if not given."""

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ConfigError("Parity needs at least two nodes: one node alone is a measure.")
        if self.rounds < 1 or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError("Parity needs at least one round and one seed, each seed once.")
        if not self.arms or len({arm.name for arm in self.arms}) != len(self.arms):
            raise ConfigError("Parity needs at least one arm, and arms need different names.")
        for arm in self.arms:
            config = arm.config(self.base, self.seeds[0])  # a bad key is told before hours of work
            if begun(config).start_tokens >= self.rounds * self.round_tokens:
                raise ConfigError(
                    f"The arm {arm.name!r} begins when all {self.rounds} rounds are over: choose "
                    "more rounds, or smaller inner.start_tokens and inner.warmup_tokens."
                )

    @cached_property
    def round_tokens(self) -> int:
        """Tokens of one round of the base configuration."""
        return self.nodes * self.base.round.tokens_per_node

    @cached_property
    def horizons(self) -> tuple[int, ...]:
        """Rounds of the base configuration after which losses are measured."""
        return horizons(self.rounds)

    def key(self, kind: Kind, arm: Arm, seed: int) -> str:
        """Names the work of one curve: arms that would give the same curve share it."""
        config = arm.config(self.base, seed).model_dump(mode="json")
        read = ["run", "model", "tokenizer", "corpus", "inner"]
        content: dict[str, Any] = {"kind": kind, "nodes": self.nodes, "rounds": self.rounds}
        content["heldout"] = self.heldout_tokens
        content["round_tokens"] = self.base.round.tokens_per_node
        if kind == "net":
            read += ["round", "outer", "uplink", "downlink", "warm_up"]
            read += ["feedback_decay", "feedback_start"]
            content["profile"] = arm.nodes.model_dump(mode="json")
        if kind != "net" or not config["inner"]["max_steps"]:
            # The measures make a step of each batch.
            del config["inner"]["max_steps"], config["inner"]["rate_power"]
        content["config"] = {key: config[key] for key in read if key in config}
        content["config"]["run"] = {"seed": seed}
        text = json.dumps(content, sort_keys=True)
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def horizons(rounds: int) -> tuple[int, ...]:
    """Dense where losses fall fast, then every tenth of the run."""
    early = [1, 2, 5, 10, 15, 20, 30]
    late = [round(rounds * tenth / 10) for tenth in range(1, 11)]
    return tuple(sorted({r for r in (*early, *late) if 1 <= r <= rounds}))


def base_config(
    *,
    model: Mapping[str, str],
    sources: Sequence[str],
    tokenizer: str | None,
    nodes: int,
    rounds: int,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float,
) -> Config:
    """The configuration that is compared when no file is given.

    One block is one batch, so that every node makes exactly ``steps`` inner steps a round. Warm-up
    over the first twentieth, then a cosine to a tenth of the peak at the end.
    """
    total = nodes * rounds * steps * batch * length
    values: dict[str, Any] = {
        "run": {"name": "parity", "rounds": rounds},
        "model": {**model, "sequence_length": length, "micro_batch": batch},
        "corpus": {"sources": list(sources), "block_tokens": max(16, batch * length)},
        "round": {"tokens_per_node": steps * batch * length},
        "inner": {
            "learning_rate": learning_rate,
            "warmup_tokens": total // 20,
            "total_tokens": total,
        },
    }
    if tokenizer is not None:
        values["tokenizer"] = {"kind": "hf", "path": tokenizer}
    try:
        return Config.model_validate(values)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"These options cannot work together: {where}: {first['msg']}.") from err
