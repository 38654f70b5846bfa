"""Models as they come: shards, tied heads, odd shapes, experts by the thousand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from talkoot.protocol.codec import encode_tensor
from talkoot.protocol.errors import ConfigError
from talkoot.protocol.manifest import Manifest, TensorSpec, manifest_of
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.model import load_pretrained, named_trainable
from talkoot.protocol.payload import verify_payload, write_payload
from talkoot.protocol.sharded import INDEX, SINGLE
from talkoot.protocol.weights import apply_update
from talkoot.server.aggregate import (
    ContributionInput,
    OuterSpec,
    VersionDir,
    aggregate_round,
    initial_state,
)
from talkoot.server.config import Config
from talkoot.server.setup import streamed_model

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def saved(directory: Path, config: Any, dtype: torch.dtype, shard: str = "20KB") -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def config_of(directory: Path) -> Config:
    return Config.model_validate(
        {"model": {"pretrained": str(directory)}, "corpus": {"sources": ["x"]}}
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sharded_model_is_copied_tensor_by_tensor_to_the_bits_that_transformers_loads(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    directory = saved(tmp_path / "m", LlamaConfig(**SMALL, tie_word_embeddings=tied), dtype)
    assert (directory / INDEX).exists()
    found = streamed_model(config_of(directory))
    assert found is not None
    config, outline, get = found
    manifest = manifest_of(named_trainable(outline))
    assert all(parameter.is_meta for _, parameter in named_trainable(outline))
    digest = initial_state(manifest, get, tmp_path / "streamed")
    loaded_config, model = load_pretrained(directory)
    named = dict(named_trainable(model))
    assert config == loaded_config
    assert manifest == manifest_of(named.items())
    assert digest == initial_state(manifest, lambda n: named[n].detach(), tmp_path / "whole")


def test_a_model_of_one_file_is_streamed_too(tmp_path: Path) -> None:
    directory = saved(tmp_path / "m", LlamaConfig(**SMALL), torch.float32, "1GB")
    assert not (directory / INDEX).exists()
    assert streamed_model(config_of(directory)) is not None


def test_tensors_under_other_names_are_left_to_transformers(tmp_path: Path) -> None:
    directory = saved(tmp_path / "m", LlamaConfig(**SMALL), torch.float32, "1GB")
    tensors = {f"other.{name}": value for name, value in load_file(directory / SINGLE).items()}
    save_file(tensors, directory / SINGLE)
    assert streamed_model(config_of(directory)) is None


@pytest.mark.parametrize("what", ["missing", "outside", "torn", "no index", "liar"])
def test_shards_that_are_not_what_the_index_says_are_refused_with_a_sentence(
    tmp_path: Path, what: str
) -> None:
    directory = saved(tmp_path / "m", LlamaConfig(**SMALL), torch.float32)
    index = json.loads((directory / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    if what == "missing":
        (directory / shard).unlink()
    elif what == "outside":
        index["weight_map"][name] = "../../etc/passwd"
    elif what == "torn":
        (directory / shard).write_bytes((directory / shard).read_bytes()[:100])
    elif what == "no index":
        index = []
    else:
        tensors = load_file(directory / shard)
        del tensors[name]
        save_file({"other": torch.zeros(1), **tensors}, directory / shard)
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        streamed_model(config_of(directory))


def test_a_mixture_of_a_thousand_small_tensors_goes_through_a_round(tmp_path: Path) -> None:
    """Both dtypes, shapes that are no multiple of a chunk, tensors shorter than one."""
    shapes = [(3, 5), (7,), (1,), (13, 11), (65,)]
    specs = tuple(
        TensorSpec(
            name=f"layers.{n // 64}.experts.{n % 64}.w{n % 5}",
            shape=shapes[n % 5],
            dtype="bfloat16" if n % 3 else "float32",
        )
        for n in range(1000)
    )
    manifest, spec = Manifest(tensors=specs), CodecSpec(chunk=64, keep=4)
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: TensorSpec) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    start = {t.name: noise(t).to(kinds[t.dtype]) for t in specs}
    initial_state(manifest, start.__getitem__, tmp_path / "v0")
    parts = []
    for node in ("a", "b"):
        items = ((t.name, encode_tensor(noise(t), spec)) for t in specs)
        write_payload(tmp_path / node, manifest, spec, items, {})
        norm = verify_payload(tmp_path / node, manifest, spec).l2_norm
        parts.append(ContributionInput(tmp_path / node, 10, norm, node))
    state = VersionDir(tmp_path / "v0")
    result = aggregate_round(
        manifest, state, parts, spec, spec, OuterSpec(), tmp_path / "v1", workers=2
    )
    found = apply_update(manifest, state.published, result.update_path, spec, tmp_path / "node")
    assert found == result.weights_digest
    assert (tmp_path / "node").read_bytes() == result.state.published.read_bytes()
