from __future__ import annotations

from pathlib import Path

import pytest

from talkoot.client.home import Counters, Home, Settings
from talkoot.protocol.errors import StateError, TalkootError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


def test_a_home_is_its_owners_alone(home: Home) -> None:
    for path in (home.root, home.work, home.store, home.logs):
        assert path.stat().st_mode & 0o777 == 0o700
    home.save(home.counters_path, Counters())
    home.write_status({"state": "idle"})
    for path in (home.counters_path, home.status_path):
        assert path.stat().st_mode & 0o777 == 0o600


def test_making_a_home_again_changes_nothing_in_it(home: Home) -> None:
    home.save(home.settings_path, Settings(threads=3))
    home.create()
    assert home.settings() == Settings(threads=3)


def test_a_home_without_a_node_says_how_to_join(home: Home) -> None:
    with pytest.raises(StateError, match="talkoot join") as refused:
        home.require()
    assert refused.value.code == "not-joined"


def test_a_home_where_a_file_is_in_the_way_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TalkootError) as refused:
        Home(tmp_path / "file").create()
    assert str(tmp_path / "file") in refused.value.sentence


def test_settings_and_counters_last(home: Home) -> None:
    assert home.settings() == Settings()
    assert home.counters() == Counters()
    settings = Settings(device="cpu", threads=2, max_rate_up=1e6)
    counters = Counters(bytes_up=1, newest_round=4, settled_lease="0" * 32, settled_accepted=True)
    home.save(home.settings_path, settings)
    home.save(home.counters_path, counters)
    assert Home(home.root).settings() == settings
    assert Home(home.root).counters() == counters


def test_damaged_settings_are_named_and_damaged_counters_start_at_nothing(home: Home) -> None:
    home.settings_path.write_bytes(b'{"threads":')
    with pytest.raises(StateError, match=r"settings\.json is damaged"):
        home.settings()
    # What only counts must not keep a node from its work.
    home.counters_path.write_bytes(b"\x00")
    assert home.counters() == Counters()


def test_counters_of_an_older_talkoot_are_read(home: Home) -> None:
    home.counters_path.write_bytes(b'{"bytes_up":7,"newest_round":3}')
    counters = home.counters()
    assert (counters.bytes_up, counters.newest_round, counters.settled_lease) == (7, 3, None)


def test_a_status_that_cannot_be_written_stops_nothing(home: Home) -> None:
    home.status_path.mkdir()
    home.write_status({"state": "training"})
    assert home.status_path.is_dir()
