"""The operator's configuration: every mistake has one sentence that names it and the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.protocol.errors import ConfigError
from talkoot.server.config import Config, dump_config, load_config, parse_config

BASE = '[model]\npreset = "nano"\n'


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, where="the.toml")
    sentence = caught.value.sentence
    assert caught.value.code == "config"
    assert sentence.startswith("the.toml")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "pydantic" not in sentence
    return sentence


def test_a_model_is_all_that_a_configuration_must_name() -> None:
    config = parse_config(BASE)
    assert config == Config.model_validate({"model": {"preset": "nano"}})
    assert config.round.quorum == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[round]\nqorum = 1", "unknown key 'round.qorum'; did you mean 'quorum'?"),
        ("[rond]\nquorum = 1", "unknown key 'rond'; did you mean 'round'?"),
        ("[inner]\nlearning_rat = 1.0", "unknown key 'inner.learning_rat'; did you mean 'learning"),
        ("[outer]\noptimiser = 'sgd'", "unknown key 'outer.optimiser'; did you mean 'optimizer'?"),
        ("[downlink]\nkep = 2", "unknown key 'downlink.kep'; did you mean 'keep'?"),
        ("[run]\nzzz = 1", "unknown key 'run.zzz'; remove it"),
    ],
)
def test_an_unknown_key_is_named_with_what_was_likely_meant(text: str, said: str) -> None:
    assert said in refusal(f"{BASE}{text}\n")


@pytest.mark.parametrize(
    ("text", "key", "shown"),
    [
        ("[round]\nquorum = 0", "round.quorum", "it is 0"),
        ("[round]\nquorum = '1'", "round.quorum", "it is '1'"),
        ("[round]\nquorum = 1.5", "round.quorum", "it is 1.5"),
        ("[round]\nquorum = true", "round.quorum", "it is True"),
        ("[round]\ndeadline_seconds = 0", "round.deadline_seconds", "it is 0"),
        ("[round]\ndeadline_seconds = nan", "round.deadline_seconds", "it is nan"),
        ("[round]\ndeadline_seconds = inf", "round.deadline_seconds", "it is inf"),
        ("[round]\nlost_after_seconds = -1", "round.lost_after_seconds", "it is -1"),
        ("[round]\ncheckpoint_every = 201", "round.checkpoint_every", "it is 201"),
        ("[run]\nname = 'No Spaces'", "run.name", "it is 'No Spaces'"),
        ("[run]\nrounds = 0", "run.rounds", "it is 0"),
        ("[run]\nseed = -1", "run.seed", "it is -1"),
        ("[inner]\nlearning_rate = 0", "inner.learning_rate", "it is 0"),
        ("[inner]\nlearning_rate = inf", "inner.learning_rate", "it is inf"),
        ("[inner]\nbeta2 = 1", "inner.beta2", "it is 1"),
        ("[outer]\noptimizer = 'adam'", "outer.optimizer", "it is 'adam'"),
        ("[outer]\nlearning_rate = -0.1", "outer.learning_rate", "it is -0.1"),
        ("[outer]\nmomentum = 1.0", "outer.momentum", "it is 1.0"),
        ("[uplink]\nkeep = 0", "uplink.keep", "it is 0"),
        ("[uplink]\nvalue_bits = 9", "uplink.value_bits", "it is 9"),
        ("[downlink]\nkind = 'zip'", "downlink.kind", "it is 'zip'"),
        ("[network]\ngateway_port = 65536", "network.gateway_port", "it is 65536"),
        ("[network]\nmax_pulls_per_second = nan", "network.max_pulls_per_second", "it is nan"),
        ("[corpus]\nblock_tokens = 8", "corpus.block_tokens", "it is 8"),
        ("[corpus]\nheldout_fraction = 0", "corpus.heldout_fraction", "it is 0"),
        ("[corpus]\nheldout_fraction = nan", "corpus.heldout_fraction", "it is nan"),
        ("[corpus]\nsources = []", "corpus.sources", "it is []"),
        ("[corpus]\nencoding = 'utf-16'", "corpus.encoding", "it is 'utf-16'"),
        ("[admission]\napprove = 'maybe'", "admission.approve", "it is 'maybe'"),
        ("[admission]\nmemory_margin = 0.9", "admission.memory_margin", "it is 0.9"),
        ("[admission]\nmemory_margin = nan", "admission.memory_margin", "it is nan"),
        ("[ledger]\nurl = 3", "ledger.url", "it is 3"),
    ],
)
def test_an_impossible_value_is_named_and_shown(text: str, key: str, shown: str) -> None:
    sentence = refusal(f"{BASE}{text}\n")
    assert f"{key}" in sentence
    assert shown in sentence


@pytest.mark.parametrize("value", ["nan", "2.0", "-0.5"])
def test_the_decay_of_the_feedback_lies_between_zero_and_one(value: str) -> None:
    assert "feedback_decay" in refusal(f"feedback_decay = {value}\n{BASE}")


@pytest.mark.parametrize(
    "text", ["[model]\n", '[model]\npreset = "nano"\nconfig = "x"', "[model]\nsequence_length = 64"]
)
def test_a_model_has_exactly_one_source(text: str) -> None:
    assert "model: give exactly one of preset, config and pretrained" in refusal(text)


def test_without_a_model_there_is_nothing_to_train() -> None:
    assert "'model' is missing" in refusal("")


@pytest.mark.parametrize("text", ["kind = 'hf'", "kind = 'bytes'\npath = 'x'", "path = 'x'"])
def test_a_tokenizer_has_a_path_exactly_when_it_needs_one(text: str) -> None:
    assert "tokenizer: path goes with kind = 'hf'" in refusal(f"{BASE}[tokenizer]\n{text}\n")


def test_blocks_are_whole_sequences() -> None:
    sentence = refusal(f"{BASE}sequence_length = 100\n[corpus]\nblock_tokens = 4096\n")
    assert (
        "corpus.block_tokens (4096) must be a multiple of model.sequence_length (100)" in sentence
    )


def test_a_lease_that_cannot_be_written_down_names_the_block_size_that_could() -> None:
    text = f"{BASE}sequence_length = 16\n[corpus]\nblock_tokens = {{}}\n[round]\n"
    text += "tokens_per_node = 100000\n"
    sentence = refusal(text.format(16))
    assert "at least 196" in sentence
    assert parse_config(text.format(208)).corpus.block_tokens == 208


def test_a_round_that_could_open_and_never_close_is_refused() -> None:
    sentence = refusal(f"{BASE}[round]\nquorum = 3\nmin_nodes = 2\n")
    assert "round.quorum (3) is larger than round.min_nodes (2)" in sentence


@pytest.mark.parametrize("text", ["[model", "[model]\npreset = nano", "a = 1\na = 2", "\x00"])
def test_what_is_not_toml_is_said_with_its_place(text: str) -> None:
    assert "is not valid TOML" in refusal(text)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no configuration at"):
        load_config(tmp_path / "absent.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml cannot be read as text"):
        load_config(binary)
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path)


settings = st.fixed_dictionaries(
    {"model": st.fixed_dictionaries({"preset": st.just("nano"), "sequence_length": st.just(64)})},
    optional={
        "feedback_decay": st.floats(0, 1),
        "run": st.fixed_dictionaries(
            {
                "name": st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
                "seed": st.integers(0, 2**32 - 1),
            }
        ),
        "corpus": st.fixed_dictionaries(
            {"sources": st.lists(st.text(), min_size=1, max_size=3).map(tuple)}
        ),
        "inner": st.fixed_dictionaries(
            {"learning_rate": st.floats(1e-300, 1e300), "epsilon": st.floats(1e-12, 1)}
        ),
        "outer": st.fixed_dictionaries(
            {
                "optimizer": st.sampled_from(["sgd", "nesterov"]),
                "momentum": st.floats(0, 1, exclude_max=True),
            }
        ),
        "downlink": st.fixed_dictionaries({"keep": st.integers(1, 4096)}),
        "tokenizer": st.fixed_dictionaries({"kind": st.just("hf"), "path": st.text()}),
        "ledger": st.fixed_dictionaries({"url": st.text()}),
    },
)


@given(settings)
def test_what_is_written_is_what_is_read_again(data: dict[str, Any]) -> None:
    config = Config.model_validate(data)
    text = dump_config(config)
    assert parse_config(text) == config
    assert dump_config(parse_config(text)) == text


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = "import sys, talkoot.server.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
