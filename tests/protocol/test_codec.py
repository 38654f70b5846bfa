"""Codec v2 against naive references, and against bytes that mean harm."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.loops import both_loops  # noqa: F401

from talkoot.protocol import codec_bits
from talkoot.protocol.codec import (
    EncodedSection,
    EncodedTensor,
    SparseTensor,
    decode_section,
    decode_tensor,
    encode_flat,
    encode_tensor,
    encode_with_feedback,
    max_encoded_bytes,
)
from talkoot.protocol.codec_bits import Layout
from talkoot.protocol.codec_encode import select_on_device, select_on_host
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.messages import CodecSpec

torch.set_num_threads(1)

SPECS = st.builds(
    lambda chunk, keep, bits: CodecSpec(chunk=chunk, keep=keep, value_bits=bits),
    st.sampled_from([1, 2, 7, 64, 300, 1024]),
    st.sampled_from([1, 2, 5, 64, 2000]),
    st.integers(2, 8),
)
KINDS = st.sampled_from(["normal", "heavy", "rows", "sparse", "zeros", "tiny", "huge"])


def sample(kind: str, numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    if kind == "heavy":
        x = x * torch.exp(3 * torch.randn(numel, generator=generator))
    elif kind == "rows":
        x = x * torch.logspace(-12, 3, numel)
    elif kind == "sparse":
        x = x * (torch.rand(numel, generator=generator) < 0.01)
    elif kind == "clustered":
        x = x * (torch.arange(numel) % 97 < 20)
    elif kind == "zeros":
        x = torch.zeros(numel)
    elif kind == "tiny":
        x = x * 1e-38
    elif kind == "huge":
        x = x * 1e17
    return x


def naive_gap_bytes(gaps: list[int]) -> bytes:
    out = bytearray()
    for gap in gaps:
        while gap >= 255:
            out.append(255)
            gap -= 255
        out.append(gap)
    return bytes(out)


def naive_decode(encoded: EncodedTensor, spec: CodecSpec) -> dict[int, float]:
    """Read an encoded tensor one entry at a time, straight from the format's description."""
    found: dict[int, float] = {}
    size = spec.chunk * max(1, codec_bits.SECTION // spec.chunk)
    for number, section in enumerate(encoded.sections):
        start = number * size
        found |= naive_section(section, start, min(size, encoded.numel - start), spec)
    return found


def naive_section(
    section: EncodedSection, origin: int, numel: int, spec: CodecSpec
) -> dict[int, float]:
    raw = iter(zstandard.ZstdDecompressor().decompress(section.gaps))
    scales = zstandard.ZstdDecompressor().decompress(section.scales)
    levels = np.frombuffer(section.table, "<f4").astype(np.float64)
    grid = codec_bits.scale_grid()
    number = int.from_bytes(section.codes, "little")
    found: dict[int, float] = {}
    for chunk, start in enumerate(range(0, numel, spec.chunk)):
        length = min(spec.chunk, numel - start)
        keep = min(length, max(1, math.ceil(spec.keep * length / spec.chunk)))
        index = -1
        for _ in range(keep):
            gap = 0
            while (byte := next(raw)) == 255:
                gap += 255
            index += gap + byte + 1
            code = number & ((1 << spec.value_bits) - 1)
            number >>= spec.value_bits
            level = code & ((1 << (spec.value_bits - 1)) - 1)
            value = float(np.float32(levels[level] * grid[scales[chunk]]))
            if index < length and value >= 2.0**-126:
                found[origin + start + index] = -value if code >> (spec.value_bits - 1) else value
    assert next(raw, None) is None
    assert number == 0
    return found


@pytest.fixture
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_bits, "SECTION", 512)


@settings(max_examples=100, deadline=None)
@given(SPECS, KINDS, st.integers(1, 2500), st.integers(0, 10**6))
def test_a_tensor_decodes_to_what_a_naive_reader_of_the_format_finds(
    spec: CodecSpec, kind: str, numel: int, seed: int
) -> None:
    encoded = encode_tensor(sample(kind, numel, seed), spec)
    decoded = decode_tensor(encoded, numel, spec)
    assert naive_decode(encoded, spec) == dict(
        zip(decoded.indices.tolist(), decoded.values.tolist(), strict=True)
    )
    assert EncodedTensor.from_bytes(encoded.to_bytes(), numel, spec) == encoded
    assert encoded.size_bytes == len(encoded.to_bytes()) <= max_encoded_bytes(numel, spec)


@settings(max_examples=100, deadline=None)
@given(SPECS, KINDS, st.integers(1, 2500), st.integers(0, 10**6))
def test_what_is_sent_is_among_the_largest_of_its_chunk_and_never_worse_than_nothing(
    spec: CodecSpec, kind: str, numel: int, seed: int
) -> None:
    x = sample(kind, numel, seed)
    decoded = decode_tensor(encode_tensor(x, spec), numel, spec)
    assert (decoded.indices.diff() > 0).all()
    for start in range(0, numel, spec.chunk):
        chunk = x[start : start + spec.chunk].abs()
        keep = min(len(chunk), math.ceil(spec.keep * len(chunk) / spec.chunk))
        here = (decoded.indices >= start) & (decoded.indices < start + spec.chunk)
        assert int(here.sum()) <= keep
        threshold = chunk.sort(descending=True).values[keep - 1]
        assert (chunk[decoded.indices[here] - start] >= threshold).all()
    source = x[decoded.indices].double()
    assert (torch.sign(source) == torch.sign(decoded.values)).all()
    assert ((source - decoded.values.double()).abs() <= source.abs() * (1 + 1e-6)).all()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(SPECS, KINDS, st.integers(1, 5000), st.integers(1, 3))
def test_sections_by_any_number_of_threads_are_those_of_one_and_need_no_other(
    small_sections: None, spec: CodecSpec, kind: str, numel: int, workers: int
) -> None:
    x = sample(kind, numel, numel)
    encoded = encode_tensor(x, spec, workers=workers)
    assert encoded == encode_tensor(x, spec, workers=1)
    again, rest = encode_with_feedback(x, None, spec, 1.0, workers=workers)
    assert again == encoded
    decoded = decode_tensor(encoded, numel, spec)
    assert torch.equal(rest, decoded.add_to_(x.clone(), alpha=-1.0))
    assert naive_decode(encoded, spec) == dict(
        zip(decoded.indices.tolist(), decoded.values.tolist(), strict=True)
    )
    for (start, elements), section in zip(
        codec_bits.section_spans(numel, spec), encoded.sections, strict=True
    ):
        alone, told = encode_flat(x[start : start + elements], spec)
        assert alone == section
        read = decode_section(section, elements, spec)
        assert torch.equal(read.indices, told.indices)
        assert torch.equal(read.values, told.values)
    assert EncodedTensor.from_bytes(encoded.to_bytes(), numel, spec) == encoded


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 3, 64, 100, 512]),
    st.sampled_from([1, 2, 9, 64]),
    st.integers(1, 6),
    st.sampled_from(["normal", "steps", "sparse", "clustered", "zeros"]),
    st.integers(0, 10**6),
)
def test_every_device_chooses_the_largest_and_of_equal_ones_the_first(
    length: int, keep: int, rows: int, kind: str, seed: int
) -> None:
    x = sample("normal" if kind == "steps" else kind, rows * length, seed).view(rows, length)
    if kind == "steps":  # many of equal magnitude
        x = (x * 2).round()
    keep = min(keep, length)
    host = select_on_host(x.numpy(), keep)
    device = select_on_device(x, keep)
    found = iter(host.local.tolist())
    for row, count in enumerate(host.counts.tolist()):
        order = sorted(range(length), key=lambda i: (-abs(float(x[row, i])), i))
        expected = sorted(i for i in order[:keep] if x[row, i] != 0)
        assert [next(found) for _ in range(count)] == expected
    assert host.local.tolist() == device.local.tolist()
    assert host.values.tolist() == device.values.tolist()
    assert host.counts.tolist() == device.counts.tolist()


def test_of_gaussian_data_every_chunk_sends_exactly_its_largest() -> None:
    x = torch.randn(10 * 4096 + 100, generator=torch.Generator().manual_seed(1))
    decoded = decode_tensor(encode_tensor(x, CodecSpec()), x.numel(), CodecSpec())
    expected = [
        start + x[start : start + 4096].abs().topk(64 if start < 40960 else 2).indices
        for start in range(0, x.numel(), 4096)
    ]
    assert torch.equal(torch.cat(expected).sort().values, decoded.indices)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=200))
def test_gaps_are_written_as_the_naive_writer_writes_them_and_read_back(gaps: list[int]) -> None:
    raw = codec_bits.encode_gaps(np.array(gaps, dtype=np.int64))
    assert raw.tobytes() == naive_gap_bytes(gaps)
    sums = codec_bits.sums_of_gaps(raw, len(gaps))
    assert (np.diff(sums, prepend=0) - 1).tolist() == gaps


@pytest.mark.parametrize("index", [0, 1, 254, 255, 256, 509, 510, 511, 4094, 4095])
def test_an_index_at_the_edge_of_an_escape_survives(index: int) -> None:
    x = torch.zeros(4096)
    x[index] = -3.0
    spec = CodecSpec(keep=1)
    decoded = decode_tensor(encode_tensor(x, spec), 4096, spec)
    assert decoded.indices.tolist() == [index]
    assert decoded.values.tolist() == pytest.approx([-3.0], rel=1e-3)


@given(st.integers(2, 8), st.lists(st.integers(0, 255), min_size=1, max_size=100))
def test_codes_of_any_width_survive_packing(bits: int, values: list[int]) -> None:
    codes = np.array([value % (1 << bits) for value in values], dtype=np.uint8)
    packed = codec_bits.pack_codes(codes, bits)
    assert len(packed) == (len(codes) * bits + 7) // 8
    raw = codec_bits.read_codes(packed, len(codes), bits)
    assert codec_bits.unpack_codes(raw, len(codes), bits).tolist() == codes.tolist()


def test_two_bits_and_a_byte_a_gap_cost_at_most_0_150_bit_a_parameter() -> None:
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(3))
    encoded = encode_tensor(x, CodecSpec())
    assert 8 * encoded.size_bytes / x.numel() <= 0.150
    kept = decode_tensor(encoded, x.numel(), CodecSpec())
    source = x[kept.indices]
    assert (source - kept.values).norm() / source.norm() < 0.08


def test_a_chunk_a_million_times_smaller_keeps_its_own_scale() -> None:
    x = torch.randn(8 * 4096, generator=torch.Generator().manual_seed(4))
    x[4096:8192] *= 1e-6
    kept = decode_tensor(encode_tensor(x, CodecSpec()), x.numel(), CodecSpec())
    small = (kept.indices >= 4096) & (kept.indices < 8192)
    source = x[kept.indices[small]]
    assert int(small.sum()) == 64
    assert (source - kept.values[small]).norm() / source.norm() < 0.10


def test_more_value_bits_mean_a_smaller_error() -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(5))
    errors = []
    for bits in range(2, 9):
        spec = CodecSpec(value_bits=bits)
        kept = decode_tensor(encode_tensor(x, spec), x.numel(), spec)
        errors.append(float((x[kept.indices] - kept.values).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


def test_zeros_are_never_sent() -> None:
    x = torch.zeros(4096)
    x[[5, 900, 4000]] = torch.tensor([1.0, -1.0, 0.5])
    kept = decode_tensor(encode_tensor(x, CodecSpec()), 4096, CodecSpec())
    assert kept.indices.tolist() == [5, 900, 4000]


@settings(max_examples=60, deadline=None)
@given(SPECS, st.sampled_from(["normal", "heavy", "sparse"]), st.integers(1, 2000))
def test_what_is_sent_and_what_stays_in_the_feedback_add_up(
    spec: CodecSpec, kind: str, numel: int
) -> None:
    delta, feedback = sample(kind, numel, 1), sample(kind, numel, 2)
    before = delta.clone(), feedback.clone()
    encoded, rest = encode_with_feedback(delta, feedback, spec, decay=0.95)
    assert torch.equal(delta, before[0])
    assert torch.equal(feedback, before[1])
    total = feedback * 0.95 + delta
    sent = decode_tensor(encoded, numel, spec)
    unsent = torch.ones(numel, dtype=torch.bool)
    unsent[sent.indices] = False
    assert torch.equal(rest[unsent], total[unsent])
    assert torch.equal(rest[sent.indices], total[sent.indices] - sent.values)
    torch.testing.assert_close(rest + sent.to_dense(numel), total, rtol=1e-6, atol=0)


def test_error_feedback_sends_all_of_a_constant_gradient_in_the_long_run() -> None:
    delta = torch.randn(32, 128, generator=torch.Generator().manual_seed(6))
    spec, feedback, sent = CodecSpec(chunk=1024, keep=64), None, torch.zeros(4096)
    for _ in range(400):
        encoded, feedback = encode_with_feedback(delta, feedback, spec, decay=1.0)
        sent += decode_tensor(encoded, 4096, spec).to_dense(4096)
    assert feedback is not None
    assert feedback.shape == delta.shape
    assert (sent / 400 - delta.reshape(-1)).norm() / delta.norm() < 0.06


def test_feedback_may_be_flat_and_delta_strided() -> None:
    delta = torch.randn(60, 40, generator=torch.Generator().manual_seed(7)).t()
    encoded, rest = encode_with_feedback(delta, torch.zeros(2400), CodecSpec(keep=9), 0.95)
    again, _ = encode_with_feedback(delta.contiguous(), None, CodecSpec(keep=9), 0.95)
    assert encoded == again
    assert rest.shape == delta.shape


@given(st.integers(1, 500), st.integers(0, 1000))
def test_dense_is_exact_to_the_bit(numel: int, seed: int) -> None:
    spec, x = CodecSpec(kind="dense"), sample("heavy", numel, seed)
    encoded = encode_tensor(x, spec)
    again = EncodedTensor.from_bytes(encoded.to_bytes(), numel, spec)
    assert torch.equal(decode_tensor(again, numel, spec).to_dense(numel), x)


def test_encoding_is_deterministic() -> None:
    x = sample("heavy", 100_000, 9)
    assert encode_tensor(x, CodecSpec()) == encode_tensor(x.clone(), CodecSpec())


def test_adding_with_a_factor_touches_only_what_was_sent() -> None:
    sparse = SparseTensor(torch.tensor([1, 3]), torch.tensor([2.0, -4.0]))
    assert sparse.add_to_(torch.ones(5), alpha=0.5).tolist() == [1.0, 2.0, 1.0, -1.0, 1.0]
    assert sparse.sum_of_squares() == 20.0


@pytest.mark.parametrize("kind", ["topk", "dense"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_value_that_is_not_finite_or_absurd_is_refused_with_a_sentence(
    kind: str, bad: float
) -> None:
    x = torch.randn(10_000)
    x[7_777] = bad
    with pytest.raises(ProtocolError, match="diverged") as caught:
        encode_tensor(x, CodecSpec.model_validate({"kind": kind}))
    assert caught.value.code == "not-finite"


# Hostile bytes ----------------------------------------------------------------------

SPEC = CodecSpec(chunk=256, keep=8, value_bits=3)
NUMEL = 1000


def good() -> EncodedTensor:
    return encode_tensor(sample("normal", NUMEL, 1), SPEC)


def part() -> EncodedSection:
    return good().sections[0]


def replaced(**parts: bytes) -> EncodedTensor:
    return EncodedTensor(NUMEL, (replace(part(), **parts),))


def refuse(encoded: EncodedTensor) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_tensor(encoded, NUMEL, SPEC)
    assert caught.value.code == "payload-malformed"


def test_a_decompression_bomb_is_refused_by_its_stated_size() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 32_768
    refuse(replaced(gaps=bomb))
    refuse(replaced(scales=bomb))


def test_a_frame_that_hides_or_belies_its_size_is_refused() -> None:
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(32))
    refuse(replaced(gaps=silent))
    liar = bytearray(zstandard.ZstdCompressor().compress(bytes(200)))
    assert liar[5] == 200  # a single-segment frame has its content size in byte 5
    liar[5] = 32
    refuse(replaced(gaps=bytes(liar)))


def test_bytes_after_a_frame_are_refused() -> None:
    refuse(replaced(gaps=part().gaps + b"x"))
    refuse(replaced(scales=part().scales + part().scales))


@pytest.mark.parametrize(
    "gaps",
    [
        [0] * 31 + [255 + 3],  # past the end of the short last chunk
        [200, 200] + [0] * 30,  # past the end of the first chunk
        [0] * 7 + [260] + [0] * 24,  # absent, but not counting up from the end
        [0] * 31,
        [0] * 33,
    ],
)
def test_indices_that_do_not_fit_their_chunks_are_refused(gaps: list[int]) -> None:
    refuse(replaced(gaps=codec_bits.compress(naive_gap_bytes(gaps))))


@pytest.mark.parametrize("level", [math.nan, math.inf, -1.0, 1e30])
def test_a_level_that_is_no_magnitude_is_refused(level: float) -> None:
    refuse(replaced(table=struct.pack("<4f", 0.1, 0.2, level, 0.3)))


def test_parts_of_a_wrong_length_are_refused() -> None:
    refuse(replaced(codes=part().codes + b"\0"))
    refuse(replaced(codes=part().codes[:-1]))
    refuse(replaced(table=part().table[:-4]))
    refuse(replaced(scales=codec_bits.compress(b"\1\2\3")))
    refuse(EncodedTensor(NUMEL + 1, good().sections))
    refuse(EncodedTensor(NUMEL, good().sections * 2))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=120), st.binary(max_size=40), st.binary(max_size=8))
def test_arbitrary_gaps_scales_and_levels_decode_or_are_refused(
    gaps: bytes, scales: bytes, table: bytes
) -> None:
    layout = Layout.of(NUMEL, SPEC)
    hostile = replaced(
        gaps=codec_bits.compress(gaps),
        scales=codec_bits.compress(scales.ljust(layout.chunks, b"\xff")[: layout.chunks]),
        table=table.ljust(layout.table_size, b"\x3f"),
    )
    try:
        decoded = decode_tensor(hostile, NUMEL, SPEC)
    except ProtocolError:
        return
    assert torch.isfinite(decoded.values).all()
    assert (decoded.indices.diff() > 0).all()
    assert decoded.indices.numel() == 0 or 0 <= int(decoded.indices[-1]) < NUMEL


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_blob_with_flipped_bytes_decodes_or_is_refused(data: st.DataObject) -> None:
    blob = bytearray(good().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    try:
        encoded = EncodedTensor.from_bytes(bytes(blob[: len(blob) - cut]), NUMEL, SPEC)
        decode_tensor(encoded, NUMEL, SPEC)
    except ProtocolError:
        pass


def test_the_layout_of_odd_sizes_is_the_documented_one() -> None:
    spec = CodecSpec(chunk=4096, keep=64)
    assert Layout.of(1, spec).entries == 1
    assert Layout.of(4095, spec).entries == 64
    assert Layout.of(4097, spec).entries == 65
    assert Layout.of(10, CodecSpec(chunk=4, keep=9)).entries == 10
