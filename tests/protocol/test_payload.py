"""The payload container, honest and hostile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tests.loops import both_loops  # noqa: F401

from talkoot.protocol.codec import encode_tensor
from talkoot.protocol.errors import ProtocolError, VersionError
from talkoot.protocol.manifest import Manifest, manifest_of
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.payload import (
    PayloadReader,
    max_payload_bytes,
    verify_payload,
    write_payload,
)

SPEC = CodecSpec(chunk=64, keep=4, value_bits=2)
SPECS = [SPEC, CodecSpec(kind="dense"), CodecSpec(chunk=100, keep=10, value_bits=5)]


def delta() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (40, 10), "norm": (10,), "head": (7, 9)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def written(path: Path, spec: CodecSpec) -> Manifest:
    manifest = manifest_of(delta().items())
    items = ((name, encode_tensor(value, spec)) for name, value in delta().items())
    write_payload(path, manifest, spec, items, {"lease": "abc"})
    return manifest


@pytest.mark.parametrize("spec", SPECS)
def test_a_payload_gives_back_every_tensor(tmp_path: Path, spec: CodecSpec) -> None:
    path = tmp_path / "p.safetensors"
    manifest = written(path, spec)
    with PayloadReader(path, manifest, spec) as reader:
        assert reader.names() == tuple(delta())
        assert reader.metadata["lease"] == "abc"
        for name, value in delta().items():
            encoded = encode_tensor(value, spec)
            assert reader.encoded(name) == encoded
        norms = [reader.decode(name).sum_of_squares() for name in reader.names()]
    facts = verify_payload(path, manifest, spec)
    assert facts.l2_norm == pytest.approx(sum(norms) ** 0.5)
    assert facts.file_bytes == path.stat().st_size <= max_payload_bytes(manifest, spec)
    assert facts.bits_per_parameter == 8 * facts.file_bytes / manifest.parameters
    if spec.kind == "dense":
        assert facts.values == manifest.parameters


def test_a_payload_is_a_safetensors_file_of_byte_tensors(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    written(path, SPEC)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(delta())
        assert all(file.get_tensor(name).dtype == torch.uint8 for name in delta())


def test_the_same_update_gives_the_same_bytes(tmp_path: Path) -> None:
    written(tmp_path / "a", SPEC)
    written(tmp_path / "b", SPEC)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_payload_of_a_million_parameters_takes_at_most_0_150_bit_each(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(2)
    big = {f"layer.{n}.weight": torch.randn(1024, 1024, generator=generator) for n in range(2)}
    manifest = manifest_of(big.items())
    spec = CodecSpec()
    items = ((name, encode_tensor(value, spec)) for name, value in big.items())
    write_payload(tmp_path / "p", manifest, spec, items, {"run": "a-run", "round": "17"})
    assert verify_payload(tmp_path / "p", manifest, spec).bits_per_parameter <= 0.150


def test_a_payload_with_a_tensor_too_few_too_many_or_of_another_size_is_not_written(
    tmp_path: Path,
) -> None:
    manifest = manifest_of(delta().items())
    whole = [(name, encode_tensor(value, SPEC)) for name, value in delta().items()]
    for items in (
        whole[:-1],
        [*whole, whole[0]],
        [*whole, ("other", whole[0][1])],
        [("norm", whole[0][1]), *whole[:1], *whole[2:]],
    ):
        with pytest.raises(ProtocolError):
            write_payload(tmp_path / "p", manifest, SPEC, items, {})
    assert list(tmp_path.iterdir()) == []


def test_another_codec_version_or_spec_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    manifest = written(path, SPEC)
    for other in SPECS[1:]:
        with pytest.raises(ProtocolError):
            verify_payload(path, manifest, other)
    path.write_bytes(path.read_bytes().replace(b'"talkoot_codec":"2"', b'"talkoot_codec":"1"'))
    with pytest.raises(VersionError, match="codec version"):
        PayloadReader(path, manifest, SPEC)


def test_a_file_of_other_dtypes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_file(delta(), path, metadata={"talkoot_codec": "2"})
    with pytest.raises(ProtocolError, match="byte tensor"):
        PayloadReader(path, manifest_of(delta().items()), CodecSpec(kind="dense"))


def test_a_file_larger_than_any_honest_payload_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    manifest = written(path, SPEC)
    with path.open("r+b") as file:
        file.truncate(max_payload_bytes(manifest, SPEC) + 1)
    with pytest.raises(ProtocolError, match="over the cap"):
        PayloadReader(path, manifest, SPEC)


def test_a_dense_payload_with_a_nan_is_refused(tmp_path: Path) -> None:
    path, spec = tmp_path / "p.safetensors", SPECS[1]
    manifest = written(path, spec)
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\x7f"
    path.write_bytes(raw)
    with pytest.raises(ProtocolError) as caught:
        verify_payload(path, manifest, spec)
    assert caught.value.code == "not-finite"


@pytest.fixture(scope="module", params=SPECS, ids=["topk", "dense", "five-bits"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest, CodecSpec, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "p.safetensors"
    manifest = written(path, request.param)
    return path, manifest, request.param, path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_payload_is_valid_or_refused_and_never_anything_else(
    whole: tuple[Path, Manifest, CodecSpec, bytes], data: st.DataObject
) -> None:
    path, manifest, spec, original = whole
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["set", "flip", "drop", "insert", "cut"])):
            case "set":
                mutated[where] = data.draw(st.integers(0, 255))
            case "flip":
                mutated[where] ^= 1 << data.draw(st.integers(0, 7))
            case "drop" if len(mutated) > 1:
                del mutated[where]
            case "insert":
                mutated[where:where] = data.draw(st.binary(max_size=9))
            case _:
                del mutated[where + 1 :]
    path.write_bytes(mutated)
    try:
        facts = verify_payload(path, manifest, spec)
    except ProtocolError:
        return
    assert facts.l2_norm >= 0
