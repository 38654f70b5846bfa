"""A copy of a running coordinator's state, and the way back from it (ADR 20).

``vault.py`` is the place where backups are, ``records.py`` what one is, ``seal.py`` the secrets in
it, ``rows.py`` the ledger in it; ``take.py`` makes one, ``restore.py`` makes a state of it.
"""

from talkoot.server.backup.restore import Restored, check, restore
from talkoot.server.backup.take import Taken, take

__all__ = ["Restored", "Taken", "check", "restore", "take"]
