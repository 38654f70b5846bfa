"""The compiled loops give NumPy's bits, and come when they pay."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.loops import KINDS, running

from talkoot.protocol import codec_bits as bits
from talkoot.protocol import kernels
from talkoot.protocol.codec import (
    EncodedSection,
    SparseTensor,
    decode_section,
    decode_tensor,
    encode_tensor,
)
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.kernels import Kernels
from talkoot.protocol.manifest import Manifest, TensorSpec
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.payload import write_payload
from talkoot.protocol.weights import add_sparse_, add_sparse_compiled_, apply_update
from talkoot.server.aggregate import (
    ContributionInput,
    OuterSpec,
    VersionDir,
    aggregate_round,
    average,
    initial_state,
)

SPECS = st.builds(
    lambda chunk, keep, bits: CodecSpec(chunk=chunk, keep=keep, value_bits=bits),
    st.sampled_from([1, 2, 7, 64, 300, 1024]),
    st.sampled_from([1, 2, 5, 64, 2000]),
    st.integers(2, 8),
)


def draw(kind: str, numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    match kind:
        case "heavy":
            x *= torch.exp(3 * torch.randn(numel, generator=generator))
        case "rows":
            x *= torch.logspace(-12, 3, numel)
        case "steps":  # many of equal magnitude
            x = (x * 2).round()
        case "sparse":
            x *= torch.rand(numel, generator=generator) < 0.01
        case "tiny":
            x *= 1e-38
        case "zeros":
            x.zero_()
    return x


@settings(max_examples=200, deadline=None)
@given(
    SPECS,
    st.sampled_from(["normal", "heavy", "rows", "steps", "sparse", "tiny", "zeros"]),
    st.integers(1, 5000),
    st.integers(0, 10**6),
)
def test_both_kinds_of_loops_write_the_same_bytes_and_read_the_same_values(
    spec: CodecSpec, kind: str, numel: int, seed: int
) -> None:
    x = draw(kind, numel, seed)
    written, read = [], []
    for loops in KINDS:
        with running(loops):
            encoded = encode_tensor(x, spec, workers=1)
            decoded = decode_tensor(encoded, numel, spec)
        written.append(encoded.to_bytes())
        read.append((decoded.indices.tolist(), decoded.values.numpy().tobytes()))
    assert written[0] == written[1]
    assert read[0] == read[1]


@settings(max_examples=300, deadline=None)
@given(
    SPECS,
    st.integers(1, 3000),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_of_bytes_that_mean_harm_both_make_the_same(
    spec: CodecSpec, numel: int, seed: int, changes: list[tuple[int, int]]
) -> None:
    """The gaps are changed before they are compressed, so that what is inside is reached."""

    encoded = encode_tensor(draw("normal", numel, seed), spec, workers=1)
    section = encoded.sections[0]
    gaps = bytearray(bits.decompress(section.gaps, low=0, high=2**22, what="gaps"))
    codes = bytearray(section.codes)
    for at, value in changes:
        gaps[at % len(gaps)] = value
        codes[at % len(codes)] ^= value
    forged = EncodedSection(bits.compress(bytes(gaps)), bytes(codes), section.scales, section.table)
    found: list[object] = []
    for loops in KINDS:
        with running(loops):
            try:
                decoded = decode_section(forged, numel, spec)
                found.append((decoded.indices.tolist(), decoded.values.numpy().tobytes()))
            except ProtocolError as err:
                found.append(err.code)
    assert found[0] == found[1]


@given(st.sampled_from([float("nan"), float("inf"), -float("inf"), 2.0**65]), st.integers(0, 9999))
@settings(max_examples=20, deadline=None)
def test_what_is_not_finite_is_refused_by_both(bad: float, at: int) -> None:
    x = draw("normal", 10000, 1)
    x[at] = bad
    for loops in KINDS:
        with running(loops), pytest.raises(ProtocolError) as caught:
            encode_tensor(x, CodecSpec(), workers=1)
        assert caught.value.code == "not-finite"


def sparse(seed: int, numel: int, share: float) -> SparseTensor:
    generator = torch.Generator().manual_seed(seed)
    indices = (torch.rand(numel, generator=generator) < share).nonzero().view(-1)
    return SparseTensor(indices, torch.randn(indices.numel(), generator=generator))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3000), st.lists(st.tuples(st.integers(0, 99), st.floats(0.01, 1)), max_size=6)
)
def test_both_average_to_the_same_bits(numel: int, senders: list[tuple[int, float]]) -> None:
    parts = [(sparse(seed, numel, 0.2), weight, 1 - weight / 2) for seed, weight in senders]
    made = []
    for loops in KINDS:
        with running(loops):
            made.append(average(numel, parts).numpy().tobytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-39, 1e38])
def test_both_add_to_weights_of_every_dtype_alike(dtype: str, scale: float) -> None:

    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    weights = (torch.randn(5000, generator=torch.Generator().manual_seed(3)) * 2).to(kind)
    update = sparse(4, 5000, 0.3)
    update = SparseTensor(update.indices, update.values * scale)
    by_torch, by_loop = weights.clone(), weights.clone()
    old, new = add_sparse_(by_torch, update)
    moved = np.empty(update.values.numel(), dtype=np.float32)
    compiled = kernels.KERNELS.compile()
    assert compiled is not None
    raw = by_loop.view(torch.uint8).numpy()
    finite = add_sparse_compiled_(compiled, raw, dtype, update, moved)
    assert torch.equal(by_torch.view(torch.uint8), by_loop.view(torch.uint8))
    assert moved.tobytes() == (new.float() - old.float()).numpy().tobytes()
    assert finite == bool(torch.isfinite(new.float()).all())


def test_weights_that_would_not_be_finite_are_told_by_the_compiled_loop() -> None:
    compiled = kernels.KERNELS.compile()
    assert compiled is not None
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        kind = torch.float32 if size == 4 else torch.bfloat16
        raw = torch.full((4,), 3e38).to(kind).view(torch.uint8).numpy()
        update = SparseTensor(torch.tensor([1]), torch.tensor([3e38]))
        assert not add_sparse_compiled_(compiled, raw, dtype, update, np.empty(0, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_a_round_and_its_update_are_the_same_files_by_both(
    tmp_path: Path, dtype: str, decay: float
) -> None:
    manifest = Manifest(
        tensors=(
            TensorSpec(name="wide", shape=(300, 50), dtype=dtype),  # type: ignore[arg-type]
            TensorSpec(name="odd", shape=(777,), dtype=dtype),  # type: ignore[arg-type]
        )
    )
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    shapes = {spec.name: spec.shape for spec in manifest.tensors}
    initial_state(manifest, lambda name: torch.ones(shapes[name], dtype=kind), tmp_path / "v0")
    uplink, downlink = CodecSpec(chunk=256, keep=16), CodecSpec(chunk=256, keep=32, value_bits=4)
    parts = []
    for node in range(3):
        items = [
            (spec.name, encode_tensor(draw("normal", spec.numel, node) * 1e-2, uplink))
            for spec in manifest.tensors
        ]
        path = tmp_path / f"c{node}"
        write_payload(path, manifest, uplink, items, {})
        parts.append(ContributionInput(path, 100 + node, 1.0, f"{node}"))
    made: list[dict[str, bytes]] = []
    for loops in KINDS:
        state = VersionDir(tmp_path / "v0")
        files: dict[str, bytes] = {}
        with running(loops):
            for number in (1, 2):  # the second starts from feedback
                out = tmp_path / f"{loops}{number}"
                spec = OuterSpec(feedback_decay=decay)
                before = state.published
                state = aggregate_round(
                    manifest, state, parts, uplink, downlink, spec, out, workers=2
                ).state
                files |= {f"{number}/{f.name}": f.read_bytes() for f in sorted(out.iterdir())}
                applied = tmp_path / f"{loops}{number}.applied"
                apply_update(manifest, before, state.update, downlink, applied)
                assert applied.read_bytes() == state.published.read_bytes()
        made.append(files)
    assert made[0].keys() == made[1].keys()
    assert len(made[0]) == 6
    for name in made[0]:
        assert made[0][name] == made[1][name], name


def test_compiling_waits_until_it_pays() -> None:
    own = Kernels(worth_it=1000)
    assert own.after(400) is None
    assert own.after(400) is None
    assert own.after(400) is not None
    assert own.after(0) is not None


def test_who_comes_while_another_compiles_goes_on_with_numpy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Kernels(worth_it=1)
    begun, go_on = threading.Event(), threading.Event()
    module = kernels.KERNELS.compile()
    assert module is not None

    def slow(name: str) -> object:
        begun.set()
        assert go_on.wait(60)
        return module

    monkeypatch.setattr("importlib.import_module", slow)
    found: list[object] = []
    first = threading.Thread(target=lambda: found.append(own.after(10)))
    first.start()
    try:
        assert begun.wait(60)
        assert own.after(10) is None
    finally:
        go_on.set()
        first.join()
    assert found == [module]
    assert own.after(0) is module


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_without_numba_all_stays_with_numpy(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def absent(name: str) -> object:
        raise error("no such thing here")

    monkeypatch.setattr("importlib.import_module", absent)
    own = Kernels(worth_it=1)
    assert own.after(10) is None
    assert own.compile() is None


def test_numba_is_not_imported_with_the_codec() -> None:

    code = (
        "import sys, talkoot.protocol.codec, talkoot.server.closing; print('numba' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_a_process_that_may_not_run_what_it_writes_stays_with_numpy() -> None:
    """As under systemd's MemoryDenyWriteExecute, or SELinux."""
    code = (
        "import ctypes; denied = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0);"  # PR_SET_MDWE
        "from talkoot.protocol.kernels import Kernels; print(denied, Kernels(1).after(2))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    denied, found = told.stdout.split()
    if denied != "0":
        pytest.skip("this kernel cannot deny it (Linux 6.3 can)")
    assert found == "None"
