"""The manifest, the digest of weights, and dense weights on disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from talkoot.protocol import limits
from talkoot.protocol.codec import encode_tensor
from talkoot.protocol.errors import ProtocolError, StateError, TalkootError
from talkoot.protocol.manifest import (
    Manifest,
    TensorSpec,
    digest_table,
    manifest_of,
    tensor_digest,
    weights_digest,
)
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.payload import write_payload
from talkoot.protocol.weights import WeightsReader, WeightsWriter, apply_update, save_weights


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(33, 7, generator=generator),
        "norm": torch.randn(5, generator=generator).bfloat16(),
        "head": torch.randn(3, 4, 2, generator=generator),
        "scalar": torch.randn((), generator=generator),
    }


def test_a_manifest_survives_its_bytes_and_its_digest_depends_on_order() -> None:
    manifest = manifest_of(model().items())
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.parameters == 33 * 7 + 5 + 24 + 1
    backwards = Manifest(tensors=manifest.tensors[::-1])
    assert backwards.digest() != manifest.digest()
    assert [spec.dtype for spec in manifest.as_float32().tensors] == ["float32"] * 4


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [{"name": "a", "shape": [1], "dtype": "float16"}],
        [{"name": "a", "shape": [0], "dtype": "float32"}],
        [{"name": "a", "shape": [-1], "dtype": "float32"}],
        [{"name": "a", "shape": [2**33, 2**33], "dtype": "float32"}],
        [{"name": "a", "shape": [1] * 9, "dtype": "float32"}],
        [{"name": "", "shape": [1], "dtype": "float32"}],
        [{"name": "__metadata__", "shape": [1], "dtype": "float32"}],
        [{"name": "a", "shape": [1], "dtype": "float32"}] * 2,
        [{"name": str(n), "shape": [2**34], "dtype": "float32"} for n in range(9)],
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(tensors: list[object]) -> None:
    with pytest.raises(ProtocolError):
        Manifest.from_bytes(json.dumps({"tensors": tensors}).encode())


def test_a_dtype_that_cannot_travel_is_named() -> None:
    with pytest.raises(ProtocolError, match="float64"):
        manifest_of([("a", torch.zeros(2, dtype=torch.float64))])
    with pytest.raises(ProtocolError, match="empty"):
        manifest_of([("a", torch.zeros(0))])


def test_a_digest_does_not_depend_on_strides() -> None:
    x = torch.randn(300, 20_000)
    for view in (x.t(), x[::3], x[:, 5:17], x.bfloat16().t()):
        assert tensor_digest(view) == tensor_digest(view.contiguous())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_flipped_bit_changes_the_digest_and_is_located(data: st.DataObject) -> None:
    weights = model()
    manifest = manifest_of(weights.items())
    before = weights_digest(manifest, weights.__getitem__)
    table = digest_table(manifest, weights.__getitem__)
    name = data.draw(st.sampled_from(sorted(weights)))
    raw = weights[name].reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert weights_digest(manifest, weights.__getitem__) != before
    changed = digest_table(manifest, weights.__getitem__)
    assert [key for key in table if table[key] != changed[key]] == [name]


def test_the_digest_tells_names_shapes_and_dtypes_apart() -> None:
    zero = torch.zeros(4)
    variants = [
        {"ab": zero, "c": zero},
        {"a": zero, "bc": zero},
        {"ab": zero.reshape(2, 2), "c": zero},
        {"ab": torch.zeros(8, dtype=torch.bfloat16), "c": zero},
    ]
    digests = {weights_digest(manifest_of(v.items()), v.__getitem__) for v in variants}
    assert len(digests) == len(variants)


def test_a_written_file_is_what_safetensors_loads(tmp_path: Path) -> None:
    weights, path = model(), tmp_path / "w.safetensors"
    manifest = manifest_of(weights.items())
    digest = save_weights(path, manifest, weights.__getitem__)
    assert digest == weights_digest(manifest, weights.__getitem__)
    loaded = load_file(path)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    reader = WeightsReader(path, manifest)
    assert reader.weights_digest() == digest
    assert reader.names() == tuple(weights)
    assert reader.get("norm").dtype == torch.bfloat16


def test_a_file_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    weights, path = model(), tmp_path / "w.safetensors"
    save_file(weights, path)
    reader = WeightsReader(path, manifest_of(weights.items()))
    assert all(torch.equal(reader.get(name), weights[name]) for name in weights)


def test_a_tensor_that_was_read_is_the_readers_own(tmp_path: Path) -> None:
    weights, path = model(), tmp_path / "w.safetensors"
    manifest = manifest_of(weights.items())
    digest = save_weights(path, manifest, weights.__getitem__)
    reader = WeightsReader(path, manifest)
    reader.get("embed").zero_()
    assert reader.weights_digest() == digest


def test_an_unfinished_file_never_appears(tmp_path: Path) -> None:
    weights, path = model(), tmp_path / "w.safetensors"
    manifest = manifest_of(weights.items())

    def write(*names: str, then: Exception | None = None) -> None:
        with WeightsWriter(path, manifest) as writer:
            for name in names:
                writer.add(name, weights[name])
            if then is not None:
                raise then

    with pytest.raises(ProtocolError, match="not written"):
        write("embed")
    with pytest.raises(ProtocolError, match="not written"):
        write()
    with pytest.raises(RuntimeError, match="broken"):
        write("embed", then=RuntimeError("broken"))
    with pytest.raises(ProtocolError, match="twice"):
        write("norm", "norm")
    weights["head"] = weights["head"].bfloat16()
    with pytest.raises(ProtocolError, match="bfloat16"):
        write("embed", "norm", "head", "scalar")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_foreign_file_is_refused_with_a_sentence(tmp_path: Path) -> None:
    weights = model()
    manifest = manifest_of(weights.items())
    with pytest.raises(StateError):
        WeightsReader(tmp_path / "none", manifest)
    path = tmp_path / "w.safetensors"
    save_file({**weights, "head": weights["head"].reshape(4, 3, 2)}, path)
    with pytest.raises(ProtocolError, match="head"):
        WeightsReader(path, manifest)
    save_file({"embed": weights["embed"]}, path)
    with pytest.raises(ProtocolError, match="not the manifest's"):
        WeightsReader(path, manifest)


def test_a_claimed_header_over_the_cap_is_refused_before_it_is_read(tmp_path: Path) -> None:
    manifest = manifest_of([("a", torch.zeros(16 * limits.MIB))])
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:  # sparse: the disk holds only the first bytes
        file.write(struct.pack("<Q", limits.MAX_SAFETENSORS_HEADER + 1))
        file.truncate(64 * limits.MIB + limits.MAX_SAFETENSORS_HEADER)
    with pytest.raises(ProtocolError, match="claims a header"):
        WeightsReader(path, manifest)
    with path.open("r+b") as file:
        file.truncate(100 * limits.MIB)
    with pytest.raises(ProtocolError, match="over the cap"):
        WeightsReader(path, manifest)


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_and_not_a_crash(
    tmp_path: Path,
) -> None:
    weights, path = model(), tmp_path / "w.safetensors"
    manifest = manifest_of(weights.items())
    save_weights(path, manifest, weights.__getitem__)
    reader = WeightsReader(path, manifest)
    with path.open("r+b") as file:
        file.truncate(reader._file.size_bytes - 5)
    with pytest.raises(ProtocolError, match="ends inside"):
        reader.weights_digest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, bytes]:
    weights = model()
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    manifest = manifest_of(weights.items())
    save_weights(path, manifest, weights.__getitem__)
    return path.with_name("mutated"), manifest, path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_header_is_read_or_refused(
    whole: tuple[Path, Manifest, bytes], data: st.DataObject
) -> None:
    path, manifest, original = whole
    (header,) = struct.unpack_from("<Q", original)
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 5))):
        mutated[data.draw(st.integers(0, header + 7))] = data.draw(st.integers(0, 255))
    path.write_bytes(mutated[: len(mutated) - data.draw(st.sampled_from([0, 0, 1, 9, 900]))])
    try:
        WeightsReader(path, manifest).weights_digest()
    except TalkootError:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["dtype", "shape", "data_offsets", "entry", "__metadata__"]), JSON)
def test_a_header_with_any_other_json_in_it_is_read_or_refused(
    whole: tuple[Path, Manifest, bytes], field: str, value: object
) -> None:
    path, manifest, original = whole
    (length,) = struct.unpack_from("<Q", original)
    header = json.loads(original[8 : 8 + length])
    if field == "__metadata__":
        header[field] = value
    elif field == "entry":
        header["norm"] = value
    else:
        header["norm"][field] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + original[8 + length :])
    try:
        WeightsReader(path, manifest).weights_digest()
    except TalkootError:
        pass


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 9_000, b"\xff{}"])
def test_a_header_made_to_break_a_json_parser_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "w"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ProtocolError):
        WeightsReader(path, manifest_of([("a", torch.zeros(3))]))


def test_applying_an_update_adds_what_was_sent_and_leaves_the_old_file(tmp_path: Path) -> None:
    old, spec = model(), CodecSpec(kind="dense")
    manifest = manifest_of(old.items())
    delta = {name: torch.randn_like(value.float()) for name, value in old.items()}
    save_weights(tmp_path / "old", manifest, old.__getitem__)
    before = (tmp_path / "old").read_bytes()
    items = ((name, encode_tensor(value, spec)) for name, value in delta.items())
    write_payload(tmp_path / "update", manifest, spec, items, {})
    digest = apply_update(manifest, tmp_path / "old", tmp_path / "update", spec, tmp_path / "new")
    expected = {name: (old[name].float() + delta[name]).to(old[name].dtype) for name in old}
    assert digest == weights_digest(manifest, expected.__getitem__)
    assert WeightsReader(tmp_path / "new", manifest).weights_digest() == digest
    assert (tmp_path / "old").read_bytes() == before


def test_a_spec_counts_its_elements_and_bytes() -> None:
    spec = TensorSpec(name="a", shape=(3, 5), dtype="bfloat16")
    assert (spec.numel, spec.size_bytes) == (15, 30)
    assert TensorSpec(name="a", shape=(), dtype="float32").numel == 1
