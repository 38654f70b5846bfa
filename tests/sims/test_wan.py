"""The line that transfers are measured over."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.sims.wan import Direction


@given(
    sizes=st.lists(st.integers(40, 1500), min_size=1, max_size=200),
    mbit=st.floats(0.1, 1000),
    delay=st.floats(0, 1),
)
def test_a_direction_keeps_order_rate_and_delay(
    sizes: list[int], mbit: float, delay: float
) -> None:
    way = Direction(mbit, delay, loss=0.0, queue=1e9, seed=0)
    for number, size in enumerate(sizes):
        assert way.offer(number.to_bytes(2, "big") + bytes(size - 2), 0.0)
    sent = 0
    for number, size in enumerate(sizes):
        sent += size
        due = way.next_at()
        assert due is not None
        assert due == pytest.approx(sent * 8e-6 / mbit + delay)
        packet = way.due(due)
        assert packet is not None
        assert (packet[:2], len(packet)) == (number.to_bytes(2, "big"), size)
    assert way.due(1e12) is None


def test_a_direction_loses_its_share_and_what_finds_its_queue_full() -> None:
    lossy = Direction(1000, 0.0, loss=0.1, queue=1e9, seed=1)
    kept = sum(lossy.offer(bytes(1000), float(second)) for second in range(10_000))
    assert 8_800 < kept < 9_200
    narrow = Direction(8, 0.0, loss=0.0, queue=0.1, seed=1)  # 1 MB a second
    assert sum(narrow.offer(bytes(1000), 0.0) for _ in range(1000)) == pytest.approx(100, abs=2)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody needs root")
def test_without_root_the_line_says_what_it_needs() -> None:
    code = "import os; os.setuid(65534); wan.insist_possible()"
    done = subprocess.run(
        [sys.executable, "-c", f"from talkoot.sims import wan; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "cannot be made here, as this user is not root: run it as root." in done.stderr
