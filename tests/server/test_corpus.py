"""Building a corpus: split by document, bit-identical, whole or absent, refused in sentences."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol.corpus import (
    CorpusManifest,
    CorpusSource,
    block_digest,
    load_block,
    load_heldout,
    read_manifest,
)
from talkoot.protocol.errors import CapacityError, ConfigError, CorpusError, StateError
from talkoot.protocol.tokenizer import ByteTokenizer, load_tokenizer, save_for_export
from talkoot.server.corpus import build_corpus
from talkoot.server.sources import (
    SINGLE_FILE_DOCUMENT_BYTES,
    Encoding,
    read_documents,
    source_name,
)

STDLIB = Path(sysconfig.get_paths()["stdlib"])
EOS = ByteTokenizer.eos_id
FILES = ("manifest.json", "blocks.idx", "tokens.bin", "heldout.bin", "heldout.src")


def build(
    out: Path,
    *sources: Path | str,
    block_tokens: int = 512,
    heldout_fraction: float = 0.1,
    seed: int = 1,
    encoding: Encoding = "utf-8",
) -> CorpusManifest:
    return build_corpus(
        [str(source) for source in sources],
        ByteTokenizer(),
        out,
        block_tokens=block_tokens,
        heldout_fraction=heldout_fraction,
        seed=seed,
        encoding=encoding,
    )


def training_tokens(directory: Path) -> list[int]:
    tokens: list[int] = np.fromfile(directory / "tokens.bin", dtype="<u2").tolist()
    return tokens


def documents_of(tokens: list[int]) -> list[str]:
    """The whole documents of a token stream (the last one may be cut off)."""
    ends = [-1, *(at for at, token in enumerate(tokens) if token == EOS)]
    return [ByteTokenizer().decode(tokens[a + 1 : b]) for a, b in pairwise(ends)]


def make_texts(folder: Path, count: int = 40) -> list[str]:
    folder.mkdir(parents=True)
    texts = [f"document {number} " + "word " * (20 + number % 7) for number in range(count)]
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    return texts


def nothing_left(folder: Path) -> bool:
    return not any(path.name.endswith(".tmp") for path in folder.iterdir())


def test_real_python_sources_become_a_corpus_that_nodes_can_read(tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    manifest = build(out, STDLIB / "json", STDLIB / "email")
    assert read_manifest(out) == manifest
    assert manifest.sources == ("json", "email")
    source = CorpusSource(out)
    index = (out / "blocks.idx").read_bytes()
    stream: list[int] = []
    for block in range(manifest.block_count):
        digest = block_digest(index, block)
        found = source.lookup(digest)
        assert found is not None
        with found.path.open("rb") as file:
            file.seek(found.offset)
            data = file.read(found.length)
        assert hashlib.sha256(data).hexdigest() == digest
        stream += load_block(data, manifest).tolist()
    assert stream == training_tokens(out)
    assert load_heldout(out, manifest)[-1] == EOS


def test_no_held_out_document_is_trained_on_and_none_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    folders = (STDLIB / "json", STDLIB / "email")
    manifest = build(out, *folders, block_tokens=1)
    written = {
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix == ".py" and path.read_text(encoding="utf-8").strip()
    }
    training = documents_of(training_tokens(out))
    heldout = documents_of(load_heldout(out, manifest).tolist())
    assert set(training).isdisjoint(heldout)
    assert {text for text in training + heldout if text in written} == written
    assert (len(training), len(heldout)) == (manifest.documents, manifest.heldout_documents)
    assert len(training) > len(heldout) > 0


def test_equal_documents_stay_on_one_side(tmp_path: Path) -> None:
    make_texts(tmp_path / "a")
    make_texts(tmp_path / "b")
    manifest = build(
        tmp_path / "out", tmp_path / "a", tmp_path / "b", block_tokens=1, heldout_fraction=0.5
    )
    training = documents_of(training_tokens(tmp_path / "out"))
    heldout = documents_of(load_heldout(tmp_path / "out", manifest).tolist())
    assert set(training).isdisjoint(heldout)
    assert len(training) + len(heldout) == 80


def test_a_rebuild_is_bit_identical_wherever_the_files_lie(tmp_path: Path) -> None:
    texts = make_texts(tmp_path / "one" / "texts")
    moved = tmp_path / "two" / "texts" / "deep"
    moved.mkdir(parents=True)
    for number, text in enumerate(reversed(texts)):
        (moved / f"{number}.md").write_text(text)
    build(tmp_path / "first", tmp_path / "one" / "texts")
    build(tmp_path / "again", tmp_path / "one" / "texts")
    build(tmp_path / "moved", tmp_path / "two" / "texts")
    for name in FILES:
        content = (tmp_path / "first" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == content
        assert (tmp_path / "moved" / name).read_bytes() == content


def test_another_seed_gives_another_order_of_the_same_documents(tmp_path: Path) -> None:
    make_texts(tmp_path / "texts")
    build(tmp_path / "one", tmp_path / "texts", seed=1, block_tokens=1)
    build(tmp_path / "two", tmp_path / "texts", seed=2, block_tokens=1)
    assert training_tokens(tmp_path / "one") != training_tokens(tmp_path / "two")


@given(
    texts=st.lists(st.text(min_size=1, max_size=60), min_size=2, max_size=12, unique=True),
    block_tokens=st.integers(1, 20),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_every_token_is_trained_on_held_out_or_counted_as_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    block_tokens: int,
    fraction: float,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("property")
    (root / "texts").mkdir()
    for number, text in enumerate(texts):
        (root / "texts" / f"{number}.txt").write_bytes(text.encode())
    kept = list(_kept(root / "texts"))
    try:
        manifest = build(
            root / "out",
            root / "texts",
            block_tokens=block_tokens,
            heldout_fraction=fraction,
            seed=seed,
        )
    except CorpusError:
        # Blank or binary texts leave too little: one document, or not one block.
        assert len(set(kept)) < 2 or min(len(text.encode()) for text in kept) + 1 < block_tokens
        assert not (root / "out").exists()
        return
    assert manifest.total_tokens == sum(len(text.encode()) + 1 for text in kept)
    assert manifest.documents + manifest.heldout_documents == len(kept)
    assert manifest.documents > 0
    assert manifest.heldout_documents > 0


def _kept(folder: Path) -> list[str]:
    try:
        return list(read_documents(str(folder)))
    except CorpusError:
        return []


def test_the_standard_library_is_a_source_without_installed_packages() -> None:
    documents = read_documents("stdlib")
    assert all(isinstance(next(documents), str) for _ in range(20))
    assert source_name("stdlib") == "stdlib"


def test_one_text_file_is_cut_in_documents_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}: äö " + "words " * 30 for number in range(500)]
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(paragraphs))
    documents = list(read_documents(str(file)))
    assert "".join(documents) == file.read_text()
    assert all(len(text.encode()) <= SINGLE_FILE_DOCUMENT_BYTES for text in documents)
    assert all(text.startswith("Paragraph") for text in documents)
    assert build(tmp_path / "out", file).heldout_documents > 0


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\ufeff"), min_size=1))
@settings(max_examples=30, deadline=None)
def test_a_file_without_any_line_is_cut_between_characters(text: str) -> None:
    from talkoot.server.sources import _cut

    data = text.encode()
    cut = _cut(data, "utf-8")
    if len(text) > 1:
        assert 0 < cut <= len(data)
    assert data[:cut].decode() + data[cut:].decode() == text


def test_a_long_file_without_any_line_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "line.txt"
    file.write_text("ä€x𝄞" * 30_000)
    assert "".join(read_documents(str(file))) == file.read_text()


def test_binary_hidden_and_blank_files_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    make_texts(folder, 5)
    (folder / "image.png").write_bytes(b"\x89PNG\x00\x01")
    (folder / "latin.txt").write_bytes("säännöt".encode("latin-1"))
    (folder / "late.bin").write_bytes(b"text " * 500_000 + b"\xff")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    assert len(list(read_documents(str(folder)))) == 5
    # As Latin-1, latin.txt is text, and so is late.bin, whose 2.5 MB are three documents.
    assert len(list(read_documents(str(folder), "latin-1"))) == 5 + 1 + 3


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert list(read_documents(str(tmp_path))) == ["hello"]


def test_an_empty_folder_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="holds no text"):
        build(tmp_path / "out", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"\xff\xfe\xfd", b"  \n "])
def test_a_file_that_is_empty_or_binary_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CorpusError, match="empty or not utf-8 text"):
        build(tmp_path / "out", tmp_path / "file")
    assert nothing_left(tmp_path)


def test_a_missing_path_and_a_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="No such file"):
        build(tmp_path / "out", tmp_path / "missing")
    with pytest.raises(CorpusError, match="neither a file nor a folder"):
        build(tmp_path / "out", "/dev/null")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_texts(tmp_path / "texts")
    # A file that answers every read with EIO, for root too: page 0 of a process's memory.
    (tmp_path / "texts" / "broken.txt").symlink_to("/proc/self/mem")
    with pytest.raises(CorpusError, match=r"broken\.txt .*make it readable"):
        build(tmp_path / "out", tmp_path / "texts")
    assert nothing_left(tmp_path)


def test_a_single_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("one.txt", "same.txt"):
        (tmp_path / "a" / name).write_text("the very same words")
    with pytest.raises(CorpusError, match="single document"):
        build(tmp_path / "out", tmp_path / "a", block_tokens=1)


def test_a_corpus_smaller_than_a_block_is_refused(tmp_path: Path) -> None:
    make_texts(tmp_path / "texts", 3)
    with pytest.raises(CorpusError, match="too small"):
        build(tmp_path / "out", tmp_path / "texts", block_tokens=10_000)
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_is_refused_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    make_texts(tmp_path / "texts")
    (tmp_path / "out").mkdir()
    build(tmp_path / "out", tmp_path / "texts")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(StateError, match="not empty"):
        build(tmp_path / "out", tmp_path / "texts", seed=9)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    with pytest.raises(StateError):
        build(tmp_path / "texts" / "000.txt" / "out", tmp_path / "texts")


def test_a_full_disk_is_told_apart_and_nothing_half_made_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_texts(tmp_path / "texts")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="full"):
        build(tmp_path / "out", tmp_path / "texts")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"heldout_fraction": 0.0},
        {"heldout_fraction": 1.0},
        {"heldout_fraction": float("nan")},
        {"block_tokens": 0},
        {"block_tokens": 2**24},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, float]
) -> None:
    make_texts(tmp_path / "texts")
    settings = {"block_tokens": 64, "heldout_fraction": 0.1, "seed": 0, **wrong}
    with pytest.raises(ConfigError):
        build_corpus(
            [str(tmp_path / "texts")],
            ByteTokenizer(),
            tmp_path / "out",
            block_tokens=int(settings["block_tokens"]),
            heldout_fraction=settings["heldout_fraction"],
            seed=int(settings["seed"]),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_progress_is_told_document_by_document(tmp_path: Path) -> None:
    make_texts(tmp_path / "texts")
    told: list[tuple[int, int]] = []
    manifest = build_corpus(
        [str(tmp_path / "texts")],
        ByteTokenizer(),
        tmp_path / "out",
        block_tokens=64,
        heldout_fraction=0.2,
        seed=0,
        progress=lambda documents, tokens: told.append((documents, tokens)),
    )
    assert [documents for documents, _ in told] == list(range(1, 41))
    assert told[-1][1] == manifest.total_tokens


def test_a_transformers_tokenizer_builds_the_same_tokens_as_its_bytes(tmp_path: Path) -> None:
    make_texts(tmp_path / "texts")
    save_for_export(ByteTokenizer(), tmp_path / "tokenizer")
    tokenizer = load_tokenizer("hf", tmp_path / "tokenizer")
    manifest = build_corpus(
        [str(tmp_path / "texts")],
        tokenizer,
        tmp_path / "hf",
        block_tokens=512,
        heldout_fraction=0.1,
        seed=1,
    )
    build(tmp_path / "bytes", tmp_path / "texts")
    assert training_tokens(tmp_path / "hf") == training_tokens(tmp_path / "bytes")
    assert manifest.tokenizer.kind == "hf"
    assert manifest.tokenizer.digest == tokenizer.digest


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is not None, reason="the extra is installed"
)
def test_a_data_set_without_its_library_is_refused_with_the_extras_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"talkoot\[datasets\]"):
        build(tmp_path / "out", "hf:some/name")
    assert nothing_left(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs talkoot[datasets]")
def test_a_local_data_set_is_a_source(tmp_path: Path) -> None:
    rows = [{"body": f"row {number} " + "word " * 20} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    documents = list(read_documents(f"hf:{tmp_path / 'rows.jsonl'}:train:body"))
    assert documents == [row["body"] for row in rows]
    with pytest.raises(CorpusError, match="column"):
        list(read_documents(f"hf:{tmp_path / 'rows.jsonl'}:train:none"))


def test_the_manifest_does_not_tell_the_operators_folders() -> None:
    assert source_name("/home/someone/secret/texts/") == "texts"
    assert source_name("hf:/home/someone/rows.jsonl:train:body") == "hf:rows.jsonl:train:body"
    assert len(source_name("/x/" + "n" * 200)) == 64
    assert source_name("/") == "folder"
