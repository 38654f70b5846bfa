"""Bytes to ids and back, and the same ids from an exported tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.tokenizer import (
    ByteTokenizer,
    HfTokenizer,
    load_tokenizer,
    save_for_export,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    """The byte tokenizer as ``AutoTokenizer`` reads it from beside a Llama model's config."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_for_export(ByteTokenizer(), folder)
    return HfTokenizer(folder)


@given(st.text(max_size=200))
def test_bytes_decode_to_the_text_that_was_encoded(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= i < 256 for i in ids)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@given(text=st.text(max_size=200))
@settings(deadline=None)
def test_the_exported_byte_tokenizer_gives_the_same_ids_and_text(
    exported: HfTokenizer, text: str
) -> None:
    ids = exported.encode(text)
    assert ids == ByteTokenizer().encode(text)
    assert exported.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "  a \n\t b ", "<|eos|>", "a<|bos|><|unused|>b", "e\u0301 's don't .", "\x00\ufeff"],
)
def test_nothing_in_a_text_is_taken_for_a_special_token_or_tidied_up(
    exported: HfTokenizer, text: str
) -> None:
    assert exported.encode(text) == list(text.encode())
    assert exported.decode(exported.encode(text)) == text
    assert exported.inner(text)["input_ids"] == list(text.encode())


def test_the_exported_byte_tokenizer_keeps_its_special_ids(exported: HfTokenizer) -> None:
    tokenizer = ByteTokenizer()
    assert exported.inner.bos_token_id == tokenizer.bos_id
    assert (exported.eos_id, exported.inner.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert exported.vocab_size == tokenizer.vocab_size
    assert exported.digest is not None


def test_an_hf_tokenizer_can_be_exported_again(exported: HfTokenizer, tmp_path: Path) -> None:
    save_for_export(exported, tmp_path)
    again = load_tokenizer("hf", tmp_path)
    assert again.encode("säännöt <|eos|>") == exported.encode("säännöt <|eos|>")
    assert again.vocab_size == exported.vocab_size


def test_a_lone_surrogate_is_encoded_alike(exported: HfTokenizer) -> None:
    assert exported.encode("a\ud800b") == ByteTokenizer().encode("a\ud800b") == list(b"a?b")


def test_a_tokenizer_that_is_not_there_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for kind, path in (("hf", tmp_path / "none"), ("hf", tmp_path), ("hf", None), ("words", None)):
        with pytest.raises(ConfigError) as refused:
            load_tokenizer(kind, path)
        assert refused.value.sentence.endswith(".")


@pytest.mark.parametrize(
    "damage",
    [{"model": 3}, {"model": {"type": "BPE", "vocab": "x"}}, {"added_tokens": [{"id": -1}]}],
)
def test_a_damaged_tokenizer_file_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    save_for_export(ByteTokenizer(), tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(ConfigError, match="save_pretrained"):
        load_tokenizer("hf", tmp_path)


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(tmp_path: Path) -> None:
    save_for_export(ByteTokenizer(), tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="end-of-sequence"):
        load_tokenizer("hf", tmp_path)
