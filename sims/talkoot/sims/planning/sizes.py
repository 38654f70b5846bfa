"""What a round moves and computes beside training: bytes from the real codec, measured seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.memory import FLOAT, predict
from talkoot.protocol.messages import CodecSpec
from talkoot.sims.scenario import Scenario

WIRE: Final = 1.04
"""Bytes on the line for one of content: TCP/IP headers (40 of 1500), TLS records, gRPC frames."""
VERIFY_NS: Final = 0.4
"""Per parameter, contribution and core: decoding a payload before it is accepted (docs/LOG.md)."""
AGGREGATE_NS: Final = 0.4
"""Per parameter, contribution and core, when a round is closed (docs/LOG.md)."""
PUBLISH_NS: Final = 10.0
"""Per parameter, two cores: reading, outer step, encoding, hashing, writing; however many
contributed."""
ENCODE_NS: Final = 5.0
"""Per parameter at 64 of 4096: a node's payload, on one CPU core. A GPU selects faster."""
APPLY_NS: Final = 4.0
"""Per parameter at 256 of 4096: one update decoded and added, on one CPU core."""
HEAR_SECONDS: Final = 0.5
"""From a lease in the ledger to its node's hands, beside the node's poll: the round loop, Flower's
SuperLink, gateway and HTTP calls. This and the next four were seen in small real networks, and are
there however small the model is (docs/LOG.md)."""
ARTIFACT_SECONDS: Final = 0.003
"""Of one fetch beside its round trip and its bytes: hashing, the file, its name."""
LEASE_SECONDS: Final = 0.25
"""Of a node, beside steps and encoding: the trainer's messages and files."""
SUBMIT_SECONDS: Final = 0.05
"""Of a payload's upload and verdict, beside round trips, bytes and decoding."""
CLOSE_SECONDS: Final = 0.2
"""From the last verdict to the next version beside the model's size: the loop, judging, commits."""
PROOF_SECONDS: Final = 120.0
"""From a fetched checkpoint to admission: a few training steps (an estimate)."""


@dataclass(frozen=True)
class Sizes:
    """Of one model under one codec. Bytes are content, without :data:`WIRE`."""

    parameters: int
    uplink_bytes: float
    update_bytes: float
    checkpoint_bytes: float
    bytes_per_token: float
    verify_seconds: float
    """Of the coordinator, a contribution, while a round is open."""
    aggregate_seconds: float
    """Of the coordinator, a contribution, when a round is closed."""
    publish_seconds: float
    encode_seconds: float
    """Of a node."""
    apply_seconds: float
    """Of a node, an update."""
    hear_seconds: float = 0.0
    """From a lease to its node's hearing of it, beside the poll and round trips."""
    artifact_seconds: float = 0.0
    """Of a fetch, beside its round trip and bytes."""
    submit_seconds: float = 0.0
    """Of an upload and its verdict, beside round trips, bytes and decoding."""


def model_config(scenario: Scenario) -> dict[str, Any]:
    """The transformers config of the scenario's model.

    Raises:
        ConfigError: it cannot be read.
    """
    from talkoot.protocol.model import parse_config, preset

    model = scenario.model
    if model.preset is not None:
        return dict(preset(model.preset))
    path = Path(model.config) if model.config else Path(model.pretrained or "") / "config.json"
    try:
        return dict(parse_config(path.read_bytes()))
    except OSError as err:
        raise ConfigError(f"The model's config cannot be read at {path}: {err}.") from err


def parameters_of(config: dict[str, Any]) -> int:
    """Parameters, from the config's numbers."""
    return predict(config, 2, 1).breakdown["device_weights"] // FLOAT


@lru_cache(maxsize=64)
def bits_per_parameter(spec_json: str) -> float:
    """What the real codec makes of half a million normally distributed values."""
    import torch

    from talkoot.protocol.codec import encode_tensor

    spec = CodecSpec.model_validate_json(spec_json)
    if spec.kind == "dense":
        return 32.0
    noise = torch.randn(2**19, generator=torch.Generator().manual_seed(0))
    return 8 * encode_tensor(noise, spec).size_bytes / noise.numel()


def payload_bytes(spec: CodecSpec, parameters: int) -> float:
    """Bytes of one payload."""
    fields = {key: getattr(spec, key) for key in CodecSpec.model_fields}
    plain = CodecSpec(**fields)
    return bits_per_parameter(json.dumps(plain.model_dump(mode="json"))) * parameters / 8


def sizes_of(scenario: Scenario, config: dict[str, Any] | None = None) -> Sizes:
    """Of the scenario's model under its codecs."""
    config = model_config(scenario) if config is None else config
    parameters = parameters_of(config)
    line = scenario.coordinator
    aggregate = line.aggregate_seconds_per_contribution
    if aggregate is None:
        aggregate = AGGREGATE_NS * 1e-9 * parameters / line.cores
    publish = line.publish_seconds
    return Sizes(
        parameters=parameters,
        uplink_bytes=payload_bytes(scenario.rules.uplink, parameters),
        update_bytes=payload_bytes(scenario.rules.downlink, parameters),
        checkpoint_bytes=4.0 * parameters,
        bytes_per_token=2.0 if int(config.get("vocab_size", 0)) <= 2**16 else 4.0,
        verify_seconds=VERIFY_NS * 1e-9 * parameters / line.cores,
        aggregate_seconds=aggregate,
        publish_seconds=CLOSE_SECONDS + PUBLISH_NS * 1e-9 * parameters
        if publish is None
        else publish,
        encode_seconds=LEASE_SECONDS + ENCODE_NS * 1e-9 * parameters,
        apply_seconds=APPLY_NS * 1e-9 * parameters,
        hear_seconds=HEAR_SECONDS,
        artifact_seconds=ARTIFACT_SECONDS,
        submit_seconds=SUBMIT_SECONDS,
    )
