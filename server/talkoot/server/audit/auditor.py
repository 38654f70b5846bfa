"""One audit of one state directory; see the package."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkoot.protocol.errors import ProtocolError, StateError, TalkootError
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.limits import MAX_JSON_ARTIFACT
from talkoot.protocol.messages import RunSpec, parse
from talkoot.server.audit import records
from talkoot.server.audit.findings import Audit
from talkoot.server.audit.reading import Row, View, view
from talkoot.server.ledger.schema import SCHEMA_REVISION

if TYPE_CHECKING:
    from talkoot.server.audit.files import Files

SECRETS = ("ca", "keys")


class Auditor:
    """Audits a state directory, again and again if wanted.

    A second audit by the same auditor does not verify again what cannot have changed: signatures
    that it has verified, files whose inode, size and time are as they were, versions that it has
    computed.

    Args:
        root: the state directory; the coordinator may be running.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._signatures = records.Signatures()
        self._files: Files | None = None

    def audit(self, *, shallow: bool = False) -> Audit:
        """Hold everything to its promises; ``shallow`` leaves the files alone.

        Raises:
            StateError: the state cannot be read at all, or is of another schema.
        """
        audit = Audit()
        marker = self._marker()
        config = self._config()
        url = config.get("ledger", {}).get("url") or f"sqlite:///{self._root / 'ledger.db'}"
        coordinator = NodeKey.load(self._root / "keys" / "coordinator.pem").public_key
        with view(url) as ledger:
            records.check_database(audit, ledger)
            self._check_schema(ledger)
            run = self._run(ledger, marker)
            audit.run_id = run["run_id"]
            facts = records.check_versions_and_rounds(audit, ledger, run)
            spec = self._signatures.read(
                audit, f"run {run['run_id']}", run["spec"], RunSpec, coordinator
            )
            if spec is not None and spec.run_id != run["run_id"]:
                audit.find("claim-differs", f"run {run['run_id']}", "Signed for another run.")
            if spec is not None:
                self._corpus_facts(spec, facts)
            records.check_leases(audit, ledger, run["run_id"], facts, coordinator, self._signatures)
            records.check_proofs(audit, ledger, facts, self._signatures)
            pending = ledger.all(
                "SELECT lease_id, payload_digest, payload_bytes FROM contributions "
                "WHERE run_id = :r AND version IS NULL",
                r=run["run_id"],
            )
        self._check_secrets(audit)
        if not shallow and spec is not None and facts.versions:
            keep = int(config.get("round", {}).get("keep_checkpoints", 2))
            newest = max(facts.versions)
            self._check_files(
                audit,
                spec,
                [facts.versions[number] for number in sorted(facts.versions)],
                pending,
                keep,
                lambda: _newest(url, run["run_id"]) > newest,
            )
        return audit

    def _marker(self) -> dict[str, Any]:
        try:
            marker = json.loads((self._root / "state.json").read_bytes())
            if not isinstance(marker, dict):
                raise ValueError("it is not a JSON object")
        except FileNotFoundError as err:
            raise StateError(
                f"{self._root} holds no finished state: name an operator's state directory.",
                code="missing",
            ) from err
        except (OSError, ValueError) as err:
            raise StateError(f"{self._root / 'state.json'} cannot be read: {err}.") from err
        return marker

    def _config(self) -> dict[str, Any]:
        path = self._root / "config.toml"
        try:
            return tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as err:
            raise StateError(f"{path} cannot be read: {err}.", code="unreadable") from err

    def _check_schema(self, ledger: View) -> None:
        revisions = [row["version_num"] for row in ledger.rows("SELECT * FROM alembic_version")]
        if revisions != [SCHEMA_REVISION]:
            raise StateError(
                f"The ledger has schema {', '.join(revisions) or 'none'} and this auditor reads "
                f"{SCHEMA_REVISION}: 'serve' or 'status' of this talkoot brings it up to date.",
                code="other-schema",
            )

    def _run(self, ledger: View, marker: dict[str, Any]) -> Row:
        for row in ledger.rows("SELECT * FROM runs"):
            if row["run_id"] == marker.get("run_id"):
                return row
        raise StateError(
            f"The ledger does not know run {marker.get('run_id')}, which {self._root} is about: "
            "restore both from one backup.",
            code="run-unknown",
        )

    def _corpus_facts(self, spec: RunSpec, facts: records.Facts) -> None:
        from talkoot.protocol.corpus import CorpusManifest

        path = self._root / "store" / spec.corpus.digest[:2] / spec.corpus.digest[2:]
        try:
            corpus = parse(CorpusManifest, path.read_bytes(), cap=MAX_JSON_ARTIFACT)
        except (OSError, ProtocolError):
            return  # a missing or damaged artifact is found among the files
        facts.block_tokens, facts.block_count = corpus.block_tokens, corpus.block_count

    def _check_secrets(self, audit: Audit) -> None:
        for name in SECRETS:
            for path in sorted((self._root / name).glob("*")):
                if path.is_file() and path.stat().st_mode & 0o077:
                    audit.find("open-secret", str(path), "Others may read it: chmod 600.")

    def _check_files(
        self,
        audit: Audit,
        spec: RunSpec,
        versions: list[Row],
        pending: list[Row],
        keep_checkpoints: int,
        moved_on: Callable[[], bool],
    ) -> None:
        from talkoot.protocol.manifest import Manifest
        from talkoot.server.audit.files import Files, check_files

        if self._files is None:
            self._files = Files(self._root)
        try:
            manifest = Manifest.from_bytes(self._files.path(spec.manifest.digest).read_bytes())
        except (OSError, TalkootError) as err:
            audit.find("missing-artifact", "the run's manifest", f"It cannot be read: {err}.")
            return
        check_files(
            audit,
            self._files,
            spec,
            manifest,
            versions,
            pending,
            keep_checkpoints=keep_checkpoints,
            moved_on=moved_on,
        )


def _newest(url: str, run_id: str) -> int:
    with view(url) as ledger:
        return ledger.number("SELECT MAX(version) FROM versions WHERE run_id = :r", r=run_id)
