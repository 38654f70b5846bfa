"""What the operator's commands print for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from talkoot.protocol.console import format_count
from talkoot.protocol.refusals import printable

_STATUS_STYLES = {"admitted": "green", "banned": "red", "refused": "red", "pending": "yellow"}


def _ago(unix: float | None) -> str:
    if unix is None:
        return "never"
    seconds = max(0.0, time.time() - unix)
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min ago"
    return f"{seconds / 3600:.1f} h ago"


def print_status(document: dict[str, Any]) -> None:
    """The run in a few lines, then its nodes, rounds and events."""
    console = Console()
    loss = document["loss"]
    console.print(
        f"[bold]{document['run_id']}[/bold]  {document['phase']}  round {document['round']} of "
        f"{document['rounds_total']}  version {document['version']} "
        f"({document['weights_digest'][:12]})"
    )
    console.print(
        f"{format_count(document['parameters'])} parameters, "
        f"{format_count(document['tokens_committed'])} tokens committed, "
        f"loss {'—' if loss is None else f'{loss:.4f}'}"
    )
    print_nodes(document["nodes"])
    print_rounds(document["history"])
    for event in document["events"][-8:]:
        told = escape(printable(event["sentence"]))
        console.print(f"[dim]{_ago(event['unix']):>12}[/dim]  {told}", highlight=False)


def print_nodes(nodes: Sequence[dict[str, Any]]) -> None:
    """One row a node."""
    console = Console()
    if not nodes:
        console.print("No nodes yet: make an invite with 'talkoot-coordinator invite'.")
        return
    table = Table(box=None)
    table.add_column("node", no_wrap=True)
    table.add_column("name", overflow="fold")
    for title in ("status", "state", "seen", "given", "tokens/s", "up", "down"):
        table.add_column(title)
    for node in nodes:
        style = _STATUS_STYLES.get(node["status"], "")
        table.add_row(
            node["node_id"],
            escape(printable(node["name"])),  # a stranger chose it
            f"[{style}]{node['status']}[/]" if style else node["status"],
            node["state"] or "—",
            _ago(node["last_seen_unix"]),
            str(node["contributions"]),
            format_count(node["tokens_per_second"]),
            format_count(node["bytes_up"]) + "B",
            format_count(node["bytes_down"]) + "B",
        )
    console.print(table)


def print_rounds(history: Sequence[dict[str, Any]]) -> None:
    """One row a round."""
    console = Console()
    if not history:
        console.print("No round is published yet.")
        return
    table = Table("round", "loss", "tokens", "nodes", "up", "update", "seconds", box=None)
    table.add_column("why it closed", overflow="fold")
    for row in history:
        table.add_row(
            str(row["round"]),
            "—" if row["loss"] is None else f"{row['loss']:.4f}",
            format_count(row["tokens"]),
            str(row["contributions"]),
            format_count(row["bytes_up"]) + "B",
            format_count(row["update_bytes"] or 0) + "B",
            f"{row['seconds']:.1f}",
            escape(row["reason"]),
        )
    console.print(table)
