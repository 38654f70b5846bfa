from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol import limits
from talkoot.protocol.artifacts import ArtifactStore, ChainSource, Ingest, Slice, sha256_file
from talkoot.protocol.errors import (
    CapacityError,
    IntegrityError,
    ProtocolError,
    StateError,
    TalkootError,
    UnavailableError,
)
from talkoot.protocol.ingest import received_bytes, trim_parts


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_under(root: Path) -> set[str]:
    """Every file but the store's lock."""
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} - {"lock"}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


# The store ----------------------------------------------------------------------


def test_bytes_are_kept_under_their_digest(store: ArtifactStore) -> None:
    ref = store.put_bytes(b"hello")
    assert ref.digest == sha(b"hello")
    assert ref.size_bytes == store.size(ref.digest) == 5
    assert store.path(ref.digest) == store.root / ref.digest[:2] / ref.digest[2:]
    with store.open(ref.digest) as file:
        assert file.read() == b"hello"
    assert store.lookup(ref.digest) == Slice(store.path(ref.digest), 0, 5)
    assert store.verify(ref.digest)


def test_putting_the_same_bytes_twice_keeps_one_file(store: ArtifactStore) -> None:
    assert store.put_bytes(b"x") == store.put_bytes(b"x")
    assert files_under(store.root) == {f"{sha(b'x')[:2]}/{sha(b'x')[2:]}"}


def test_a_moved_file_is_gone_from_where_it_was_and_a_copied_one_is_not(
    store: ArtifactStore, tmp_path: Path
) -> None:
    for name, move in (("a", True), ("b", False)):
        path = tmp_path / name
        path.write_bytes(name.encode())
        ref = store.put_file(path, move)
        assert store.verify(ref.digest)
        assert path.exists() is not move


def test_moving_a_file_that_is_stored_already_removes_it(
    store: ArtifactStore, tmp_path: Path
) -> None:
    store.put_bytes(b"same")
    path = tmp_path / "same"
    path.write_bytes(b"same")
    assert store.put_file(path).digest == sha(b"same")
    assert not path.exists()


def test_a_symlink_is_copied_and_never_becomes_an_artifact(
    store: ArtifactStore, tmp_path: Path
) -> None:
    (tmp_path / "real").write_bytes(b"real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ref = store.put_file(tmp_path / "link")
    assert not store.path(ref.digest).is_symlink()
    assert (tmp_path / "real").exists()


@pytest.mark.parametrize(
    "digest", ["", "ab", "../" * 20 + "etc", "A" * 64, "a" * 63 + "\n", "a" * 64 + "\n", "a" * 65]
)
def test_what_is_not_a_digest_never_becomes_a_path(store: ArtifactStore, digest: str) -> None:
    for use in (store.path, store.has, store.open, store.lookup, store.delete):
        with pytest.raises(ProtocolError):
            use(digest)


def test_an_absent_artifact_is_named_in_the_error(store: ArtifactStore) -> None:
    for use in (store.open, store.size):
        with pytest.raises(StateError) as info:
            use("0" * 64)
        assert info.value.code == "missing-artifact"
    assert store.lookup("0" * 64) is None
    assert not store.has("0" * 64)
    assert not store.verify("0" * 64)
    assert not store.delete("0" * 64)


def test_verify_sees_a_flipped_bit(store: ArtifactStore) -> None:
    ref = store.put_bytes(b"precious")
    store.path(ref.digest).write_bytes(b"Precious")
    assert not store.verify(ref.digest)


def test_a_chain_answers_with_the_first_source_that_knows(tmp_path: Path) -> None:
    one, two = ArtifactStore(tmp_path / "1"), ArtifactStore(tmp_path / "2")
    both = one.put_bytes(b"both").digest
    two.put_bytes(b"both")
    late = two.put_bytes(b"late").digest
    chain = ChainSource([one, two])
    assert chain.lookup(both) == one.lookup(both)
    assert chain.lookup(late) == two.lookup(late)
    assert chain.lookup("0" * 64) is None


def test_a_sweep_keeps_what_is_asked_and_frees_the_rest(store: ArtifactStore) -> None:
    keep, drop = store.put_bytes(b"keep").digest, store.put_bytes(b"drop!").digest
    swept = store.sweep({keep})
    assert (swept.artifacts, swept.freed_bytes) == (1, 5)
    assert store.has(keep)
    assert not store.has(drop)


def test_a_sweep_leaves_what_was_stored_after_the_given_moment(store: ArtifactStore) -> None:
    old, new = store.put_bytes(b"old").digest, store.put_bytes(b"new").digest
    again = store.put_bytes(b"stored again").digest
    for digest in (old, again):
        os.utime(store.path(digest), (1000, 1000))
    store.put_bytes(b"stored again")
    store.sweep(set(), older_than_unix=2000)
    assert not store.has(old)
    assert store.has(new)
    assert store.has(again)


def test_a_sweep_removes_a_dead_writers_temporary_and_not_a_living_ones(
    store: ArtifactStore,
) -> None:
    program = (
        "import sys, os\n"
        "from pathlib import Path\n"
        "from talkoot.protocol.artifacts import ArtifactStore\n"
        "with ArtifactStore(Path(sys.argv[1]))._writer() as (fd, path):\n"
        "    os.write(fd, b'half')\n"
        "    print(path, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        temporary = Path(writer.stdout.readline().strip())
        assert store.sweep(set()).temporaries == 0
        assert temporary.exists()
        writer.kill()
    assert store.sweep(set()).temporaries == 1
    assert not temporary.exists()


def test_a_sweep_leaves_parts_unless_they_are_old_and_unwanted(store: ArtifactStore) -> None:
    wanted, unwanted, busy = sha(b"1"), sha(b"2"), sha(b"3")
    for digest in (wanted, unwanted):
        with store.ingest("fetch", digest, 10) as ingest:
            ingest.append(0, b"abc")
    with store.ingest("fetch", busy, 10) as ingest:
        ingest.append(0, b"abc")
        for part in store.incoming.rglob("*.part"):
            os.utime(part, (1000, 1000))
        assert store.sweep({wanted}).temporaries == 0
        assert store.sweep({wanted}, older_than_unix=2000).temporaries == 1
    kept = {path.stem for path in store.incoming.rglob("*.part")}
    assert kept == {wanted, busy}


# Reception ----------------------------------------------------------------------


def test_an_ingest_goes_on_where_the_last_process_ended(store: ArtifactStore) -> None:
    data = bytes(range(200))
    with store.ingest("fetch", sha(data), 200) as ingest:
        ingest.append(0, data[:70])
    assert received_bytes(store.incoming, "fetch", sha(data), 200) == 70
    with store.ingest("fetch", sha(data), 200) as ingest:
        assert ingest.offset() == 70
        ingest.append(70, data[70:])
        assert ingest.finish() == store.path(sha(data))
    assert store.verify(sha(data))
    assert not list(store.incoming.rglob("*.part"))


def test_wrong_bytes_are_an_integrity_error_and_nothing_is_left(store: ArtifactStore) -> None:
    with store.ingest("fetch", sha(b"right"), 5) as ingest:
        ingest.append(0, b"wrong")
        with pytest.raises(IntegrityError):
            ingest.finish()
    assert files_under(store.root) == set()


def test_bytes_past_the_claimed_size_are_refused_before_they_are_written(
    store: ArtifactStore,
) -> None:
    with store.ingest("fetch", sha(b"x"), 10) as ingest:
        ingest.append(0, b"12345")
        with pytest.raises(ProtocolError) as info:
            ingest.append(5, b"123456")
        assert info.value.code == "too-large"
        assert received_bytes(store.incoming, "fetch", sha(b"x"), 10) == 5


@pytest.mark.parametrize("offset", [0, 4, 6, 2**63])
def test_bytes_for_another_offset_are_refused(store: ArtifactStore, offset: int) -> None:
    with store.ingest("fetch", sha(b"x"), 10) as ingest:
        ingest.append(0, b"12345")
        with pytest.raises(ProtocolError) as info:
            ingest.append(offset, b"1")
        assert info.value.code == "wrong-offset"


@pytest.mark.parametrize("size", [-1, limits.MAX_ARTIFACT + 1])
def test_an_impossible_size_is_refused_before_a_file_is_made(
    store: ArtifactStore, size: int
) -> None:
    with pytest.raises(ProtocolError):
        store.ingest("fetch", sha(b"x"), size)
    assert files_under(store.root) == set()


@pytest.mark.parametrize("owner", ["", "..", "a/b", "/etc", "A", "a" * 65, "a\n", ".x"])
def test_an_owner_that_is_no_plain_name_is_refused(store: ArtifactStore, owner: str) -> None:
    with pytest.raises(ProtocolError):
        store.ingest(owner, sha(b"x"), 1)


def test_finishing_early_says_what_is_missing_and_keeps_the_part(store: ArtifactStore) -> None:
    with store.ingest("fetch", sha(b"x"), 10) as ingest:
        ingest.append(0, b"1234")
        with pytest.raises(ProtocolError) as info:
            ingest.finish()
        assert info.value.code == "incomplete"
    assert received_bytes(store.incoming, "fetch", sha(b"x"), 10) == 4


def test_an_empty_artifact_can_be_received(store: ArtifactStore) -> None:
    with store.ingest("fetch", sha(b""), 0) as ingest:
        ingest.finish()
    assert store.verify(sha(b""))


def test_one_artifact_is_received_once_at_a_time_for_one_owner(store: ArtifactStore) -> None:
    with store.ingest("node-a", sha(b"x"), 10):
        with pytest.raises(UnavailableError) as info:
            store.ingest("node-a", sha(b"x"), 10)
        assert info.value.code == "in-progress"
        store.ingest("node-b", sha(b"x"), 10).close()
    store.ingest("node-a", sha(b"x"), 10).close()


def test_a_part_longer_than_the_claim_is_begun_anew(store: ArtifactStore) -> None:
    with store.ingest("fetch", sha(b"abc"), 10) as ingest:
        ingest.append(0, b"123456")
    assert received_bytes(store.incoming, "fetch", sha(b"abc"), 3) == 0
    with store.ingest("fetch", sha(b"abc"), 3) as ingest:
        assert ingest.offset() == 0
        ingest.append(0, b"abc")
        ingest.finish()


def test_a_whole_file_that_was_never_delivered_is_taken_up_again(tmp_path: Path) -> None:
    data = b"delivered late"
    with Ingest(tmp_path, "node", sha(data), len(data)) as ingest:
        ingest.append(0, data)
        whole = ingest.finish()
    assert whole == tmp_path / "node" / sha(data)
    assert received_bytes(tmp_path, "node", sha(data), len(data)) == len(data)
    with Ingest(tmp_path, "node", sha(data), len(data)) as ingest:
        assert ingest.offset() == len(data)
        assert ingest.finish() == whole


def test_a_part_that_is_a_symlink_is_not_followed(store: ArtifactStore, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"")
    directory = store.incoming / "fetch"
    directory.mkdir()
    (directory / f"{sha(b'x')}.part").symlink_to(victim)
    with pytest.raises(TalkootError):
        store.ingest("fetch", sha(b"x"), 1)


def test_trimming_removes_the_oldest_parts_and_none_in_use(tmp_path: Path) -> None:
    digests = [sha(bytes([i])) for i in range(5)]
    for age, digest in enumerate(digests):
        with Ingest(tmp_path, "node", digest, 10) as ingest:
            ingest.append(0, b"1")
        os.utime(tmp_path / "node" / f"{digest}.part", (1000 + age, 1000 + age))
    with Ingest(tmp_path, "node", digests[0], 10):
        assert trim_parts(tmp_path, "node", 2, spare=digests[4]) == [digests[1]]
    assert trim_parts(tmp_path, "node", 2, spare=digests[4]) == [digests[0]]
    assert trim_parts(tmp_path, "nobody", 0) == []


def test_a_full_disk_is_a_capacity_error_and_the_part_is_what_it_was(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(4096)
    real_write = os.write
    room = [1000]

    def write_until_full(fd: int, chunk: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real_write(fd, bytes(chunk)[: room[0]])
        room[0] -= written
        return written

    with store.ingest("fetch", sha(data), len(data)) as ingest:
        ingest.append(0, data[:500])
        monkeypatch.setattr(os, "write", write_until_full)
        with pytest.raises(CapacityError) as info:
            ingest.append(500, data[500:])
        assert info.value.code == "disk-full"
        assert "free some space" in info.value.sentence
        assert received_bytes(store.incoming, "fetch", sha(data), len(data)) == 500
        with pytest.raises(CapacityError):
            store.put_bytes(data)
        monkeypatch.undo()
        ingest.append(500, data[500:])
        ingest.finish()
    assert store.verify(sha(data))
    assert files_under(store.root) == {f"{sha(data)[:2]}/{sha(data)[2:]}"}


def test_an_artifact_larger_than_the_free_disk_is_refused_before_a_byte(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs_result((4096, 4096, 100, 1, 1, 10, 10, 10, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda fd: full)
    with pytest.raises(CapacityError) as info:
        store.ingest("fetch", sha(b"x"), 4097)
    assert info.value.code == "disk-full"
    store.ingest("fetch", sha(b"x"), 4096).close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "stale", "ahead", "corrupt", "crash", "reopen"]),
        st.integers(1, 40),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(min_size=1, max_size=200), steps=STEPS)
def test_any_interleaving_of_appends_and_crashes_gives_the_exact_file_or_an_error(
    data: bytes, steps: list[tuple[str, int]]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        store = ArtifactStore(Path(root))
        digest = sha(data)
        ingest = store.ingest("fetch", digest, len(data))
        damaged = False
        for step, count in steps:
            at = ingest.offset()
            if step == "append":
                ingest.append(at, data[at : at + count])
            elif step == "stale" and at:
                with pytest.raises(ProtocolError):
                    ingest.append(at - 1, data[at - 1 : at])
            elif step == "ahead":
                with pytest.raises(ProtocolError):
                    ingest.append(at + count, b"x")
            elif step == "corrupt" and at < len(data):
                damaged = True
                ingest.append(at, bytes([data[at] ^ 1]))
            elif step == "crash":
                # Dies inside a write: any prefix of the chunk may have reached the file.
                ingest.close()
                part = store.incoming / "fetch" / f"{digest}.part"
                with part.open("ab") as file:
                    file.write(data[at : at + count][: count // 2])
                ingest = store.ingest("fetch", digest, len(data))
            elif step == "reopen":
                ingest.close()
                ingest = store.ingest("fetch", digest, len(data))
        at = ingest.offset()
        ingest.append(at, data[at:])
        if damaged:
            with pytest.raises(IntegrityError):
                ingest.finish()
            assert files_under(store.root) == set()
        else:
            assert ingest.finish().read_bytes() == data
        ingest.close()


def test_hashing_a_file_gives_digest_and_size(tmp_path: Path) -> None:
    data = os.urandom(9 * limits.MIB + 5)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == (sha(data), len(data))
