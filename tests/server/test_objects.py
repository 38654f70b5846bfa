"""Artifacts in an object store: a real S3-like server, folders, and plain web servers over them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from sqlalchemy import select
from tests.data_plane import Network, ref_of

from talkoot.protocol.artifacts import ArtifactStore, Slice
from talkoot.protocol.errors import ConfigError, RefusedError, TalkootError, UnavailableError
from talkoot.server.copier import Copier, StoppedError, verify_store
from talkoot.server.ledger.schema import Event
from talkoot.server.objects import PART_BYTES, ObjectStore, UploadRate

BUCKET = "talkoot-test"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3-like server with one bucket."""
    from moto.server import ThreadedMotoServer

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(keys)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urlopen(Request(f"{address}/{BUCKET}", method="PUT")).close()
    yield address
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, s3: str, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return ObjectStore(f"file://{tmp_path}/objects")
    return ObjectStore(f"s3://{BUCKET}/{tmp_path.name}", endpoint=s3, region="us-east-1")


def slice_of(tmp_path: Path, data: bytes, before: bytes = b"") -> Slice:
    path = tmp_path / f"source-{len(data)}"
    path.write_bytes(before + data + b"after")
    return Slice(path, len(before), len(data))


@pytest.mark.parametrize("size", [0, 1, PART_BYTES + 5])
def test_an_artifact_comes_back_as_it_was_put(
    store: ObjectStore, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    digest = ref_of(data).digest
    assert store.size(digest) is None
    assert store.verify(digest) is None
    for _ in range(2):  # again changes nothing
        store.put(digest, slice_of(tmp_path, data, b"before"))
        assert store.size(digest) == size
        assert store.verify(digest) is True
        assert [(o.digest, o.size) for o in store.objects()] == [(digest, size)]
    store.delete(digest)
    store.delete(digest)
    assert list(store.objects()) == []


def test_other_bytes_under_a_name_are_found_out(store: ObjectStore, tmp_path: Path) -> None:
    digest = ref_of(b"right").digest
    store.put(digest, slice_of(tmp_path, b"wrong"))
    assert store.verify(digest) is False


def test_an_upload_that_is_ended_leaves_no_object(store: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(2 * PART_BYTES)
    digest = ref_of(data).digest
    sent = 0

    def stop_half_way() -> None:
        nonlocal sent
        sent += 1
        if sent > 20:
            raise StoppedError

    with pytest.raises((StoppedError, TalkootError)):
        store.put(digest, slice_of(tmp_path, data), UploadRate(None, stop_half_way))
    assert store.size(digest) is None


def test_a_store_that_is_not_there_is_an_error_with_a_way_out(s3: str, tmp_path: Path) -> None:
    found = slice_of(tmp_path, b"data")
    digest = ref_of(b"data").digest
    gone = ObjectStore("s3://no-such-bucket/x", endpoint=s3, region="us-east-1")
    with pytest.raises(RefusedError, match="make the bucket"):
        gone.put(digest, found)
    nobody = ObjectStore("s3://bucket/x", endpoint="http://127.0.0.1:9", region="us-east-1")
    with pytest.raises(UnavailableError, match="tried again"):
        nobody.put(digest, found)


@pytest.mark.parametrize("url", ["ftp://host/x", "bucket", "s3:", "memory:///"])
def test_a_url_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as info:
        ObjectStore(url)
    assert info.value.code == "store-url"


# The copier ----------------------------------------------------------------------


def configured(site: Any, store: ObjectStore, **section: object) -> Copier:
    site.reopen(store=section)
    return Copier(site.coordinator, store)


def events(site: Any, kind: str) -> list[str]:
    with site.coordinator.ledger.read() as session:
        return list(session.scalars(select(Event.sentence).where(Event.kind == kind)))


def test_a_network_is_copied_whole_and_once(site: Any, store: ObjectStore) -> None:
    copier = configured(site, store)
    done = copier.turn()
    corpus = site.coordinator.corpus
    assert done.objects == len(list(store.objects()))
    assert done.objects > corpus.block_count
    assert verify_store(site.coordinator, store, print)[1:] == (0, 0)
    assert store.verify(site.coordinator.corpus.blocks_index.digest) is True
    again = copier.turn()
    assert (again.objects, again.present) == (0, len(copier._book.served_digests(2)))
    # Another process finds what is there, and copies nothing.
    assert configured(site, store).turn().objects == 0


def test_blocks_can_be_left_out(site: Any, store: ObjectStore) -> None:
    done = configured(site, store, blocks=False).turn()
    assert done.objects < 10


def test_a_copier_that_is_stopped_goes_on_later(site: Any, store: ObjectStore) -> None:
    copier = configured(site, store)
    asked = 0

    def soon() -> bool:
        nonlocal asked
        asked += 1
        return asked > 12

    copier.should_stop = soon
    with pytest.raises(StoppedError):
        copier.turn()
    before = len(list(store.objects()))
    assert before > 0
    copier.should_stop = lambda: False
    assert copier.turn().objects > 0
    assert verify_store(site.coordinator, store, print)[1:] == (0, 0)


def test_what_nothing_refers_to_is_deleted_in_time_and_blocks_never(
    site: Any, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = configured(site, store, keep_days=3.0)
    copier.turn()
    rubbish = ref_of(b"of an earlier version").digest
    store.put(rubbish, slice_of(tmp_path, b"of an earlier version"))
    everything = {found.digest for found in store.objects()}
    now = time.time()
    monkeypatch.setattr("talkoot.server.copier.time.time", lambda: now + 2 * 86_400)
    assert copier.turn().deleted == 0
    monkeypatch.setattr("talkoot.server.copier.time.time", lambda: now + 4 * 86_400)
    assert copier.turn().deleted == 1
    assert {found.digest for found in store.objects()} == everything - {rubbish}


def test_a_store_that_fails_is_put_on_record_once_and_tried_again(site: Any, s3: str) -> None:
    late = ObjectStore("s3://made-later/x", endpoint=s3, region="us-east-1")
    copier = configured(site, late, blocks=False)
    turns = 0

    def wait(seconds: float) -> bool:
        nonlocal turns
        turns += 1
        if turns == 2:
            urlopen(Request(f"{s3}/made-later", method="PUT")).close()
        return turns == 3

    copier.run(wait)
    assert verify_store(site.coordinator, late, print)[1:] == (0, 0)
    told = events(site, "store")
    assert len(told) == 2
    assert "make the bucket" in told[0]
    assert "works again" in told[1]


def test_a_store_that_can_only_be_read_is_not_copied_to(site: Any) -> None:
    with pytest.raises(ConfigError, match=r"mirrors\.urls"):
        configured(site, ObjectStore("https://host/x"))


# As a mirror ----------------------------------------------------------------------


class Ranges(SimpleHTTPRequestHandler):
    """Python's own web server, which knows no ranges: a node begins there and ends elsewhere."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_bucket_serves_nodes_as_a_mirror(network: Network, s3: str, tmp_path: Path) -> None:
    data = os.urandom(PART_BYTES + 77)
    ref = ref_of(data)
    store = ObjectStore(f"s3://{BUCKET}/mirror", endpoint=s3, region="us-east-1")
    store.put(ref.digest, slice_of(tmp_path, data))
    network.shelf.store.put_bytes(data)  # the list of pieces is the coordinator's
    client = network.client()
    client.mirrors.mirrors.replace([f"{s3}/{BUCKET}/mirror"])
    local = network.local()
    with local.ingest("fetch", ref.digest, ref.size_bytes) as ingest:
        ingest.append(0, data[:1000])  # what an earlier process fetched
    assert client.fetch(ref, local).read_bytes() == data
    assert client.mirrors.bytes_received == len(data) - 1000


def test_a_web_server_over_a_copy_of_the_store_is_a_mirror(
    network: Network, tmp_path: Path
) -> None:
    copy = ArtifactStore(tmp_path / "copy")
    ref = copy.put_bytes(os.urandom(50_000))
    server = HTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(copy.root)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        client = network.client()
        url = f"http://127.0.0.1:{server.server_port}"
        client.mirrors.mirrors.replace([url])
        assert client.fetch(ref, network.local()).read_bytes() == copy.path(ref.digest).read_bytes()
        # The operator can ask the same of it.
        assert ObjectStore(url).verify(ref.digest) is True
        assert ObjectStore(url).verify(ref_of(b"else").digest) is None
    finally:
        server.shutdown()
        server.server_close()
