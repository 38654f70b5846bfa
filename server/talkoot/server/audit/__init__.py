"""The auditor: holds a coordinator's ledger and files to their promises, from outside.

It shares no rule with the code that it audits: it reads the tables with its own queries, hashes the
files itself, and takes from ``talkoot.protocol`` only what both sides of the wire agree on (message
formats, signatures, the codec).
"""

from talkoot.server.audit.auditor import Auditor
from talkoot.server.audit.findings import Audit, Finding

__all__ = ["Audit", "Auditor", "Finding"]
