"""What an audit found: findings are broken promises, facts are what was looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One broken promise."""

    code: str
    """Stable and machine-readable, e.g. ``"block-twice"``."""
    where: str
    """The row or file: ``"lease 3f…"``, ``"version 12"``."""
    sentence: str


@dataclass
class Audit:
    """The findings, and what was counted on the way."""

    run_id: str = ""
    findings: list[Finding] = field(default_factory=list)
    versions: int = 0
    """Published, version 0 among them."""
    chain_verified: list[int] = field(default_factory=list)
    """Versions whose weights were computed anew and have the ledger's digest."""
    collected: list[int] = field(default_factory=list)
    """Versions whose weights cannot be computed any more: what leads there was collected."""
    rounds: int = 0
    leases: int = 0
    contributions: int = 0
    pending: int = 0
    """Contributions of a round that is not published yet."""
    committed_blocks: int = 0
    signatures: int = 0
    """Verified, over runs, tasks, contributions and proofs."""
    artifacts: int = 0
    """Files whose bytes were hashed."""

    @property
    def whole(self) -> bool:
        """Whether every promise held."""
        return not self.findings

    def find(self, code: str, where: str, sentence: str) -> None:
        """Put a broken promise on the list."""
        self.findings.append(Finding(code, where, sentence))

    def to_json(self) -> dict[str, Any]:
        """For ``verify --json``."""
        return {"whole": self.whole, **asdict(self)}

    def lines(self) -> list[str]:
        """For people."""
        chain = f"{len(self.chain_verified)} versions computed anew"
        if self.collected:
            first, last = min(self.collected), max(self.collected)
            chain += (
                f", {len(self.collected)} not (versions {first} to {last}: what leads there was "
                "collected)"
            )
        lines = [
            f"Run {self.run_id}: {self.versions} versions, {self.rounds} rounds, {self.leases} "
            f"leases, {self.contributions} contributions ({self.pending} pending), "
            f"{self.committed_blocks} committed blocks.",
            f"Checked {self.signatures} signatures and {self.artifacts} files; {chain}.",
        ]
        lines += [f"{f.code}: {f.where}: {f.sentence}" for f in self.findings]
        lines.append("All is whole." if self.whole else f"{len(self.findings)} findings.")
        return lines
