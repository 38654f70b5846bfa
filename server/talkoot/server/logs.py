"""Where a part of the coordinator writes what it does."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

MAX_LOG = 16 * 2**20  # bytes
BACKUPS = 3


def configure(path: Path | None) -> None:
    """Log to a file that is turned over when it grows, or to standard error."""
    handler: logging.Handler = (
        logging.handlers.RotatingFileHandler(path, maxBytes=MAX_LOG, backupCount=BACKUPS)
        if path is not None
        else logging.StreamHandler()
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.raiseExceptions = False  # a log that cannot be written is not worth a traceback
    root = logging.getLogger("talkoot")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
