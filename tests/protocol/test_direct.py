"""Transfers past the page cache move the same bytes as any others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol import direct
from talkoot.protocol.direct import BLOCK, PastCache, congruent

MOST = 40 * BLOCK
ranges = st.lists(
    st.tuples(st.integers(0, MOST), st.integers(0, MOST), st.integers(0, BLOCK)), max_size=5
)


def _room(size: int, at: int, off: int) -> direct.U8:
    return congruent(np.empty(size + 2 * BLOCK, dtype=np.uint8), size, at + off)


@settings(deadline=None, max_examples=60)
@given(ranges=ranges, seed=st.integers(0, 99), here=st.booleans())
def test_ranges_in_any_place_and_memory_hold_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    ranges: list[tuple[int, int, int]],
    seed: int,
    here: bool,
) -> None:
    path = tmp_path_factory.mktemp("direct") / "file"
    noise = np.random.default_rng(seed)
    model = np.zeros(2 * MOST, dtype=np.uint8)
    with path.open("w+b") as file, PastCache(file.fileno(), os.O_WRONLY) as disk:
        disk._looked = disk._looked or not here  # a file system that has nothing of the kind
        os.truncate(file.fileno(), model.size)
        for at, size, off in ranges:
            data = _room(size, at, off)
            data[:] = noise.integers(0, 256, size, dtype=np.uint8)
            model[at : at + size] = data
            disk.write(data, at)
    assert path.read_bytes() == model.tobytes()
    with path.open("rb") as old, PastCache(old.fileno(), os.O_RDONLY) as disk:
        for at, size, off in ranges:
            data = _room(size, at, off)
            assert disk.read(data, at) == size
            assert (data == model[at : at + size]).all()
        tail = _room(MOST, MOST + 5, 0)
        assert disk.read(tail, MOST + 5) == MOST - 5  # as many as there are
        assert (tail[:-5] == model[MOST + 5 :]).all()


def test_memory_that_lies_as_the_file_does_goes_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def watched(fd: int, data: memoryview, at: int) -> int:
        moved.append((fd, len(data)))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", watched)
    size, at = 20 * BLOCK, 3 * BLOCK + 8
    with (tmp_path / "file").open("wb") as file, PastCache(file.fileno(), os.O_WRONLY) as disk:
        data = _room(size, at, 0)
        data[:] = 1
        disk.write(data, at)
        ends = [length for fd, length in moved if fd == file.fileno()]
        middle = [length for fd, length in moved if fd != file.fileno()]
    if not middle:
        pytest.skip("this file system has no direct transfers")
    assert middle == [19 * BLOCK]
    assert ends == [BLOCK - 8, 8]


def test_a_file_that_ends_early_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(250)) * 1000)
    with (tmp_path / "file").open("rb") as file, PastCache(file.fileno(), os.O_RDONLY) as disk:
        data = _room(300_000, 0, 0)
        assert disk.read(data, 0) == 250_000
        assert data[:250_000].tobytes() == bytes(range(250)) * 1000
        assert disk.read(data, 400_000) == 0


def test_a_file_that_took_the_name_of_an_open_one_is_left_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_bytes(b"x" * MOST)
    data = _room(MOST, 0, 0)
    data[:] = 7
    with path.open("w+b") as file, PastCache(file.fileno(), os.O_WRONLY) as disk:
        other.replace(path)  # the open one has no name now
        disk.write(data, 0)
        assert os.pread(file.fileno(), MOST, 0) == data.tobytes()
    assert path.read_bytes() == b"x" * MOST
