"""Nobody costs others more than a share: calls, connections, silence; and a ban cuts what runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from talkoot.protocol.errors import UnavailableError
from talkoot.server.calls import Calls
from talkoot.server.door import Doorkeeper, GuardedSocket, PortGuard
from talkoot.server.first_word import SilentCalls


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_node_has_its_own_rate_and_its_own_share_of_open_calls() -> None:
    clock = Clock()
    quotas = {"Report": (3, 1.0), "Fetch": (2, 1.0)}
    calls = Calls(quotas, per_node=2, now=clock, streams=("Fetch",))
    first = calls.admit("a", "Report", lambda: None)
    calls.admit("a", "Report", lambda: None)
    with pytest.raises(UnavailableError):
        calls.admit("a", "Report", lambda: None)  # two are open
    calls.admit("b", "Report", lambda: None)
    calls.admit("a", "Fetch", lambda: None)  # has its stream, and no share here
    calls.admit("a", "Fetch", lambda: None)
    with pytest.raises(UnavailableError):
        calls.admit("a", "Fetch", lambda: None)  # three in no time
    with first:
        pass
    calls.admit("a", "Report", lambda: None).__exit__(None, None, None)
    with pytest.raises(UnavailableError):
        calls.admit("a", "Report", lambda: None)  # three in no time
    clock.now += 1.0
    calls.admit("a", "Report", lambda: None)


def test_the_calls_of_the_banned_are_ended_and_no_others() -> None:
    quotas = {"Report": (9, 1.0), "Fetch": (9, 1.0)}
    calls = Calls(quotas, per_node=9, now=Clock(), streams=("Fetch",))
    ended: list[str] = []
    calls.admit("a", "Report", lambda: ended.append("a"))
    calls.admit("b", "Fetch", lambda: ended.append("b"))
    over = calls.admit("b", "Report", lambda: ended.append("over"))
    over.close()
    assert calls.end({"b", "c"}) == 1
    assert ended == ["b"]


def test_many_peers_together_cannot_hold_all_threads_by_saying_nothing() -> None:
    clock = Clock()
    silent = SilentCalls(60.0, per_peer=2, now=clock, total=3)
    ended: list[str] = []
    with ExitStack() as stack:

        def call(peer: str) -> bool:
            return stack.enter_context(silent.waiting(peer, lambda: ended.append(peer)))

        assert [call("a"), call("a"), call("a"), call("b")] == [True, True, False, True]
        assert call("c")
        assert ended == ["a"]  # who has the most loses its oldest
        assert call("d")
        assert ended == ["a"]  # all have one, and had no time to speak yet
        clock.now = 3.0
        assert call("e")
        assert ended == ["a", "a"]


def test_one_address_cannot_take_all_places_and_gives_its_own_back() -> None:
    door = Doorkeeper(total=3, per_address=2)
    assert [door.enter("a"), door.enter("a"), door.enter("a")] == [True, True, False]
    assert [door.enter("b"), door.enter("c")] == [True, False]
    door.leave("a")
    assert door.enter("c")


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def closed(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_guarded_socket_hangs_up_on_who_is_too_many_and_lets_in_who_comes_after() -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    address = plain.getsockname()
    with GuardedSocket(plain, Doorkeeper(total=10, per_address=1)) as listening:
        inside: list[socket.socket] = []

        def let_in() -> None:
            inside.extend(listening.accept()[0] for _ in range(2))

        thread = threading.Thread(target=let_in)
        thread.start()
        first = socket.create_connection(address)
        wait_until(lambda: len(inside) == 1)
        second = socket.create_connection(address)
        assert closed(second)
        inside[0].close()
        third = socket.create_connection(address)
        thread.join(30)
        assert len(inside) == 2
        for connection in (*inside, first, second, third):
            connection.close()


def test_the_guard_of_a_foreign_port_ends_the_newest_of_an_address_that_holds_too_many() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        guard = PortGuard(address[1], per_address=2)
        pairs = [(socket.create_connection(address), listening.accept()[0]) for _ in range(2)]
        assert guard.look() == 0
        pairs += [(socket.create_connection(address), listening.accept()[0]) for _ in range(3)]
        assert guard.look() == 3
        assert [closed(client) for client, _ in pairs] == [False, False, True, True, True]
        for client, server in pairs:
            client.close()
            server.close()
