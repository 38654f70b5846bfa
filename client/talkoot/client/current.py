"""Which worker does what a message to the ClientApp asks for, and when its errors are a verdict.

The daemon lends its worker to the app in its own process; under a stock SuperNode each message gets
one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from talkoot.client.caps import OVER_MAX_DISK
from talkoot.client.home import Home
from talkoot.client.reporter import Reporter
from talkoot.client.trainer_host import TrainerHost
from talkoot.client.worker import Worker
from talkoot.protocol.errors import ProtocolError, TalkootError, UnavailableError
from talkoot.protocol.files import DirectoryLock

DISK_FULL: Final = "disk-full"
"""Of this machine, or of the coordinator's."""
READ_ONLY: Final = "read-only"
"""Of this machine."""

_current: Worker | None = None


def set_current(worker: Worker | None) -> None:
    """Let the daemon lend its worker to the ClientApp in the same process."""
    global _current
    _current = worker


def goes_on_later(err: TalkootError) -> bool:
    """Whether a lease that ended with this error is kept, and taken up again by the daemon.

    One whose disk has turned read-only, or whose files reach the cap on them, ends first: its
    owner has to see to that.
    """
    if _current is None or err.code == "trainer-died":  # that often, it is not worth waiting for
        return False
    return isinstance(err, UnavailableError) or err.code in (DISK_FULL, READ_ONLY, OVER_MAX_DISK)


def tell_given_back(err: TalkootError) -> None:
    """Say at the daemon, if there is one, why a lease was given back."""
    if _current is not None:
        _current.tell(f"The lease was given back: {err.sentence}")


@contextmanager
def worker_for(home: str) -> Iterator[Worker]:
    """The daemon's worker, or one of our own under a stock SuperNode."""
    path = Path(home).expanduser().absolute()
    if _current is not None:
        if _current.home.root != path:
            raise ProtocolError("The message came to another node's home.")
        yield _current
        return
    node = Home(path)
    node.require()
    with (
        DirectoryLock(node.root, who="talkoot daemon"),
        TrainerHost.of(node) as trainer,
    ):
        trainer.start()
        worker = Worker(node, trainer)
        reporter = Reporter(worker, lambda _reply: None)
        reporter.start()
        try:
            yield worker
        finally:
            reporter.close()
            with suppress(TalkootError):
                worker.report(leaving=True)
            worker.close()
