"""A node's reports and its certificate, kept up in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from talkoot.client.worker import Worker
from talkoot.protocol.errors import RefusedError, TalkootError
from talkoot.protocol.messages import NodeReportReply

log = logging.getLogger(__name__)


class Reporter:
    """Reports in the background, as often as the coordinator asks for."""

    def __init__(
        self, worker: Worker, tell: Callable[[NodeReportReply | TalkootError], None]
    ) -> None:
        self._worker = worker
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()

    def close(self) -> None:
        """End."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        pause = 1.0
        while True:
            try:
                self._worker.membership.keep(time.time())
            except TalkootError as err:
                log.info("membership: %s", err.sentence)
                if isinstance(err, RefusedError) and not self._stop.is_set():
                    self._tell(err)
            except Exception:
                log.exception("the certificate could not be renewed")
            try:
                reply = self._worker.report()
                pause = reply.report_seconds
                self._tell(reply)
            except TalkootError as err:
                log.info("report: %s", err.sentence)
                if not self._stop.is_set():
                    self._tell(err)
            except Exception:  # a node that falls silent is taken for lost
                log.exception("a report could not be made")
            if self._stop.wait(pause):
                return
