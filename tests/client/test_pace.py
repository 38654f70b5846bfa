from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.client.pace import Meter, Patience, RateLimit, Stopped, TransferOptions, Watch, wait
from talkoot.protocol.errors import ConfigError, UnavailableError

LINE_DOWN = UnavailableError("The line is down.")


@given(
    rate=st.floats(10, 1e9),
    amounts=st.lists(st.integers(0, 2**20), min_size=1, max_size=50),
    gaps=st.lists(st.floats(0, 3), min_size=50, max_size=50),
)
def test_traffic_never_outruns_the_rate_by_more_than_one_second(
    rate: float, amounts: list[int], gaps: list[float]
) -> None:
    limit = RateLimit(rate)
    now, sent = 100.0, 0
    for amount, gap in zip(amounts, gaps, strict=False):
        now += gap
        now += limit.take(amount, now)
        sent += amount
        assert sent <= rate * (now - 100.0 + 1.0) * (1 + 1e-9) + 1e-3


def test_no_limit_never_waits() -> None:
    assert RateLimit(None).take(2**40, 0.0) == 0.0


def test_patience_ends_after_attempts_in_a_row_that_move_nothing() -> None:
    options = TransferOptions(attempts=3, first_delay_seconds=1.0, max_delay_seconds=3.0)
    patience = Patience(options)
    assert [patience.delay(0, LINE_DOWN), patience.delay(0, LINE_DOWN)] == [1.0, 2.0]
    with pytest.raises(UnavailableError) as info:
        patience.delay(0, LINE_DOWN)
    assert info.value is LINE_DOWN


def test_progress_renews_patience_for_as_long_as_it_takes() -> None:
    options = TransferOptions(attempts=2, first_delay_seconds=1.0, max_delay_seconds=30.0)
    patience = Patience(options)
    assert {patience.delay(reached, LINE_DOWN) for reached in range(1000)} == {1.0}


@given(attempts=st.integers(2, 5000))
def test_delays_stay_under_their_cap(attempts: int) -> None:
    patience = Patience(
        TransferOptions(attempts=attempts, first_delay_seconds=0.5, max_delay_seconds=30.0)
    )
    delays = [patience.delay(0, LINE_DOWN) for _ in range(attempts - 1)]
    assert delays == sorted(delays)
    assert max(delays) <= 30.0


@pytest.mark.parametrize(
    "values",
    [
        {"max_rate_up": 0.0},
        {"max_rate_down": -1.0},
        {"attempts": 0},
        {"stall_seconds": 0.0},
        {"first_delay_seconds": 9.0, "max_delay_seconds": 1.0},
    ],
)
def test_impossible_options_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TransferOptions(**values)  # type: ignore[arg-type]  # wrong values are the point


def test_a_meter_counts_from_where_it_was_in_any_thread() -> None:
    meter = Meter(bytes_up=10, bytes_down=20)

    def count() -> None:
        for _ in range(1000):
            meter.add(up=1, down=2)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (meter.bytes_up, meter.bytes_down) == (4010, 8020)


def test_waiting_ends_when_asked() -> None:
    with pytest.raises(Stopped):
        wait(3600.0, lambda: True)


@pytest.mark.parametrize(("stop", "stall"), [(True, 3600.0), (False, 0.01)])
def test_a_watch_cancels_a_call_that_is_unwanted_or_stands_still(stop: bool, stall: float) -> None:
    cancelled = threading.Event()
    with Watch(cancelled.set, lambda: stop, stall) as watch:
        assert cancelled.wait(30)
    assert watch.stopped is stop
    assert watch.stalled is not stop
