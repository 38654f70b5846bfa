"""What the commands about invites, the queue and the CA print."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from talkoot.protocol.messages import Capability, parse
from talkoot.protocol.refusals import printable

if TYPE_CHECKING:
    from talkoot.server.coordinator import Coordinator
    from talkoot.server.ledger.schema import Applicant, Invite


def _when(unix: float | None) -> str:
    return "—" if unix is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(unix))


def invite_rows(invites: Sequence[tuple[Invite, int]], now: float) -> list[dict[str, Any]]:
    """One row an invite, with its state: open, used, expired, revoked."""
    return [
        {
            "invite": record.invite_id,
            "role": record.role,
            "state": _invite_state(record, now),
            "uses_left": record.uses_left,
            "nodes": used,
            "created_unix": record.created_unix,
            "expires_unix": record.expires_unix,
        }
        for record, used in invites
    ]


def _invite_state(record: Invite, now: float) -> str:
    if record.revoked_unix is not None:
        return "revoked"
    if record.uses_left < 1:
        return "used"
    return "expired" if record.expires_unix <= now else "open"


def print_invites(rows: Sequence[dict[str, Any]]) -> None:
    """As a table."""
    console = Console()
    if not rows:
        console.print("No invites yet: make one with 'talkoot-coordinator invite'.")
        return
    table = Table("invite", "role", "state", "left", "nodes", "made", "until", box=None)
    for row in rows:
        table.add_row(
            str(row["invite"]),
            row["role"],
            row["state"],
            str(row["uses_left"]),
            str(row["nodes"]),
            _when(row["created_unix"]),
            _when(row["expires_unix"]),
        )
    console.print(table)


def applicant_rows(applicants: Sequence[Applicant], now: float) -> list[dict[str, Any]]:
    """One row a node that waits, with the machine that it says it is."""
    return [
        {
            "node_id": applicant.node_id,
            "name": applicant.name,
            "address": applicant.address,
            "device_name": capability.device_name,
            "memory_bytes": capability.device_total_bytes,
            "applied_unix": applicant.applied_unix,
            "waited_seconds": max(0.0, now - applicant.applied_unix),
        }
        for applicant in applicants
        for capability in (parse(Capability, applicant.capability.encode("ascii")),)
    ]


def print_applicants(rows: Sequence[dict[str, Any]]) -> None:
    """As a table."""
    console = Console()
    if not rows:
        console.print("Nobody waits to be let in.")
        return
    table = Table(box=None)
    table.add_column("node", no_wrap=True)
    for title in ("name", "from", "device", "memory", "asked"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(
            row["node_id"],
            escape(printable(row["name"])),  # strangers chose these
            row["address"],
            escape(printable(row["device_name"])),
            f"{row['memory_bytes'] / 2**30:.1f} GiB",
            _when(row["applied_unix"]),
        )
    console.print(table)


def ca_document(coordinator: Coordinator, now: float) -> dict[str, Any]:
    """The CAs as they stand."""
    trust = coordinator.trust()
    return {
        "serial": trust.serial,
        "switch_unix": trust.switch_unix,
        "seconds_left": None if trust.switch_unix is None else max(0.0, trust.switch_unix - now),
        "certificate_days": coordinator.config.admission.certificate_days,
        "authorities": [
            {
                "fingerprint": authority.fingerprint,
                "expires_unix": authority.expires.timestamp(),
                "signs_nodes": authority is trust.issuing,
                "signs_servers": authority is trust.serving,
            }
            for authority in trust.authorities
        ],
    }


def print_ca(document: dict[str, Any]) -> None:
    """In a few lines."""
    console = Console()
    for authority in document["authorities"]:
        signs = [
            who
            for who, does in (
                ("nodes", authority["signs_nodes"]),
                ("servers", authority["signs_servers"]),
            )
            if does
        ]
        console.print(
            f"{authority['fingerprint']}  until {_when(authority['expires_unix'])}, signs the "
            f"certificates of {' and '.join(signs) or 'nobody any more'}",
            highlight=False,
            soft_wrap=True,
        )
    if document["switch_unix"] is not None:
        console.print(
            f"A rotation is under way: until {_when(document['switch_unix'])} both are accepted."
        )
    console.print(
        f"Nodes' certificates last {document['certificate_days']:g} days and renew themselves."
    )
