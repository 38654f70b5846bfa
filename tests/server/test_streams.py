from __future__ import annotations

import pytest

from talkoot.protocol.errors import UnavailableError
from talkoot.server.streams import MIN_PROGRESS, Stream, StreamTable


class Table(StreamTable):
    """A table with a clock in hand, whose streams end as soon as they are cancelled."""

    def __init__(self, *, total: int = 4, per_node: int = 2) -> None:
        self.time = 0.0
        self.cancelled: list[Stream] = []
        super().__init__(
            total=total,
            per_node=per_node,
            stall_seconds=10.0,
            patience_seconds=0.0,
            now=lambda: self.time,
        )

    def open(self, node_id: str, *, obedient: bool = True) -> Stream:
        def cancel() -> None:
            self.cancelled.append(stream)
            if obedient:
                stream.release()

        stream: Stream = self.admit(node_id, cancel)
        return stream


def test_a_node_over_its_share_loses_its_own_oldest_stream() -> None:
    table = Table()
    other = table.open("b")
    first, second = table.open("a"), table.open("a")
    table.open("a")
    assert table.cancelled == [first]
    assert other not in table.cancelled
    assert second not in table.cancelled


def test_a_node_whose_streams_do_not_end_gets_no_more() -> None:
    table = Table()
    table.open("a", obedient=False)
    table.open("a", obedient=False)
    with pytest.raises(UnavailableError) as info:
        table.open("a")
    assert info.value.code == "busy"


def test_a_full_table_ends_what_stands_still_and_nothing_that_moves() -> None:
    table = Table()
    streams = [table.open(node) for node in "abcd"]
    table.time = 9.0
    streams[0].touch(MIN_PROGRESS)
    table.time = 11.0
    table.open("e")
    assert table.cancelled == streams[1:]


def test_a_full_table_of_moving_streams_is_busy() -> None:
    table = Table()
    for node in "abcd":
        table.open(node)
    with pytest.raises(UnavailableError) as info:
        table.open("e")
    assert info.value.code == "busy"
    assert table.cancelled == []


def test_a_full_table_takes_a_moving_stream_from_whoever_has_two_more_than_the_newcomer() -> None:
    table = Table(total=4, per_node=4)
    first = table.open("a")
    others = [table.open(node) for node in "aab"]
    table.time = 5.0
    first.touch(MIN_PROGRESS)
    table.open("c")
    assert table.cancelled == [others[0]]  # of the node with three, and still for longest
    with pytest.raises(UnavailableError):  # a: 2, b: 1, c: 1: nobody has two more than b
        table.open("b")
    assert table.by_node() == {"a": 2, "b": 1, "c": 1}


def test_a_released_place_is_free_again() -> None:
    table = Table(total=1, per_node=1)
    with table.open("a") as stream:
        pass
    stream.release()
    table.open("b")
    assert table.cancelled == []


def test_a_claim_ends_the_same_nodes_earlier_stream_on_the_same_key_only() -> None:
    table = Table()
    first, rival, second = table.open("a"), table.open("b"), table.open("a")
    first.claim("x")
    rival.claim("x")
    second.claim("y")
    assert table.cancelled == []
    second.claim("x")
    assert table.cancelled == [first]


def test_a_claim_on_what_cannot_be_interrupted_is_refused() -> None:
    table = Table()
    table.open("a", obedient=False).claim("x")
    with pytest.raises(UnavailableError) as info:
        table.open("a").claim("x")
    assert info.value.code == "in-progress"
