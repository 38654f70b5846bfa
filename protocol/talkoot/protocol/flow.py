"""How large a streamed message is: small until the line has shown that it is fast.

A message counts as progress only when it is whole, and holds up everything behind it on its
connection. Of 1 MiB on a line of 2 KB a second nobody would hear for eight minutes; 16 KiB at a
time costs a fast line a third of its speed. So the size follows what the line was seen to carry.
Both sides of the data plane send in this way. Pure: time is an argument.
"""

from __future__ import annotations

from typing import Final

from talkoot.protocol import limits

SMALLEST: Final = 16 * limits.KIB
BUFFERED: Final = 8 * limits.MIB
"""More than the buffers between two sides hold: what they swallow says nothing about the line."""
MESSAGE_SECONDS: Final = 0.25
"""What one message should take at the speed that was seen."""


class ChunkPace:
    """The size of the next message of one stream.

    Args:
        now: monotonic seconds at the stream's beginning.
        largest: bytes that a message may have.
    """

    def __init__(self, now: float, largest: int = limits.TRANSFER_CHUNK) -> None:
        self._began = now
        self._largest = largest
        self._sent = 0

    def took(self, amount: int) -> None:
        """``amount`` bytes were handed to the connection."""
        self._sent += amount

    def size(self, now: float) -> int:
        """Bytes of the next message."""
        beyond = self._sent - BUFFERED
        if beyond <= 0:
            return min(self._largest, 4 * SMALLEST)
        seen = beyond / max(now - self._began, 1e-3)  # bytes per second that left the buffers
        return min(self._largest, max(SMALLEST, int(seen * MESSAGE_SECONDS)))
