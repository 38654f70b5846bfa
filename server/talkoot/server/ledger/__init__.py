"""The ledger: nodes, leases, contributions, rounds and versions in one transactional store."""

from talkoot.server.ledger.database import Ledger, LedgerError

__all__ = ["Ledger", "LedgerError"]
