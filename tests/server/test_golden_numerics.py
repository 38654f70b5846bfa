"""Frozen vectors for the codec, the outer step and one whole round.

``TALKOOT_REGEN_GOLDEN=1 pytest tests/server/test_golden_numerics.py`` writes them anew: do that
only for a change that is meant to change the numbers, and raise the protocol or codec version.

Decoding is frozen to the bit, since all nodes must agree. What an encoder chooses may differ in the
last digit between machines (fused multiply-add, libm), and is compared with a tolerance.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from talkoot.protocol.codec import EncodedTensor, decode_tensor, encode_tensor
from talkoot.protocol.manifest import manifest_of, tensor_digest, weights_digest
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.payload import verify_payload, write_payload
from talkoot.server.aggregate import (
    ContributionInput,
    VersionDir,
    aggregate_round,
    initial_state,
)
from talkoot.server.outer import OuterSpec, outer_step

GOLDEN = Path(__file__).parents[1] / "golden"
REGENERATE = os.environ.get("TALKOOT_REGEN_GOLDEN") == "1"


def frozen(name: str, measured: Any) -> Any:
    path = GOLDEN / f"{name}.json"
    if REGENERATE:
        path.write_text(json.dumps(measured, indent=1) + "\n")
    return json.loads(path.read_text())


def numbers(count: int, seed: int) -> torch.Tensor:
    """Heavy-tailed values from integer arithmetic alone: no library's generator is frozen here."""
    state = np.uint64(seed * 2 + 1)
    out = np.empty(count, dtype=np.float32)
    with np.errstate(over="ignore"):
        for position in range(count):
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            centred = int(state >> np.uint64(40)) - (1 << 23)
            out[position] = (centred / (1 << 23)) ** 5
    return torch.from_numpy(out)


SPECS = [
    CodecSpec(chunk=256, keep=8, value_bits=2),
    CodecSpec(chunk=512, keep=20, value_bits=5),
    CodecSpec(kind="dense"),
]


@pytest.mark.parametrize("which", range(3))
def test_the_codec_writes_and_reads_as_it_always_did(which: int) -> None:
    spec, x = SPECS[which], numbers(120 if SPECS[which].kind == "dense" else 1500, which)
    encoded = encode_tensor(x, spec)
    sent = decode_tensor(encoded, x.numel(), spec)
    golden = frozen(
        f"codec-{which}",
        {
            "blob": encoded.to_bytes().hex(),
            "indices": sent.indices.tolist(),
            "values": [value.hex() for value in sent.values.tolist()],
        },
    )
    blob = bytes.fromhex(golden["blob"])
    old = decode_tensor(EncodedTensor.from_bytes(blob, x.numel(), spec), x.numel(), spec)
    assert old.indices.tolist() == golden["indices"]
    assert [value.hex() for value in old.values.tolist()] == golden["values"]
    assert sent.indices.tolist() == golden["indices"]
    torch.testing.assert_close(sent.values, old.values, rtol=1e-6, atol=0)


def test_the_outer_step_is_what_it_always_was() -> None:
    measured: dict[str, list[float]] = {}
    for name, spec in {
        "sgd": OuterSpec(learning_rate=0.8, feedback_decay=1.0),
        "nesterov": OuterSpec(
            optimizer="nesterov", learning_rate=0.7, momentum=0.9, feedback_decay=1.0
        ),
    }.items():
        master, momentum = numbers(24, 1), None
        for step in range(4):
            master, momentum = outer_step(spec, master, numbers(24, 10 + step), momentum)
        measured[name] = master.tolist()
    golden = frozen("outer", measured)
    for name, values in measured.items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(golden[name]), rtol=1e-6, atol=1e-7
        )


def test_a_whole_round_is_what_it_always_was(tmp_path: Path) -> None:
    weights = {
        "embed": numbers(900, 1).reshape(30, 30),
        "norm": numbers(30, 2).bfloat16(),
        "head": numbers(300, 3).reshape(10, 30).bfloat16(),
    }
    manifest = manifest_of(weights.items())
    first = initial_state(manifest, weights.__getitem__, tmp_path / "v0")
    spec, parts = SPECS[0], []
    for node in range(3):
        path = tmp_path / f"c{node}"
        items = [
            (name, encode_tensor(0.1 * numbers(value.numel(), 100 * node + seed), spec))
            for seed, (name, value) in enumerate(weights.items())
        ]
        write_payload(path, manifest, spec, items, {})
        norm = verify_payload(path, manifest, spec).l2_norm
        parts.append(ContributionInput(path, 1000 * (node + 1), norm, path.name))
    outer = OuterSpec(optimizer="nesterov", learning_rate=0.7, momentum=0.9, feedback_decay=1.0)
    state = VersionDir(tmp_path / "v0")
    for version in (1, 2):
        result = aggregate_round(
            manifest, state, parts, spec, spec, outer, tmp_path / f"v{version}"
        )
        state = result.state
    published, feedback = load_file(state.published), load_file(state.feedback_path)
    master = {name: published[name].float() + feedback[name] for name in published}
    measured = {
        "manifest": manifest.digest(),
        "first": first,
        "embed": tensor_digest(weights["embed"]).hex(),
        "norms": [part.l2_norm for part in parts],
        "update_norm": result.update_norm,
        "gradient_norm": result.gradient_norm,
        "master": master["head"].reshape(-1).tolist(),
        "published": published["embed"].reshape(-1)[:300].tolist(),
    }
    golden = frozen("round", measured)
    assert result.weights_digest == weights_digest(manifest, published.__getitem__)
    for exact in ("manifest", "first", "embed"):
        assert measured[exact] == golden[exact]
    for close in ("norms", "update_norm", "gradient_norm", "master", "published"):
        torch.testing.assert_close(
            torch.tensor(measured[close]), torch.tensor(golden[close]), rtol=1e-5, atol=1e-7
        )
