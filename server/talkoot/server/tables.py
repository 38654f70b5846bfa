"""What the operator's commands print for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from talkoot.protocol.console import format_count
from talkoot.protocol.memory import format_size
from talkoot.protocol.refusals import printable

_STATUS_STYLES = {
    "admitted": "green",
    "banned": "red",
    "refused": "red",
    "quarantined": "red",
    "pending": "yellow",
    "on probation": "yellow",
}


WIDE = 100
"""Columns of a terminal that has room for a table's bytes, too."""


def _since(unix: float | None) -> str:
    if unix is None:
        return "never"
    seconds = max(0.0, time.time() - unix)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


def _ago(unix: float | None) -> str:
    return "never" if unix is None else f"{_since(unix)} ago"


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
    print_heldout(document["heldout"])
    print_nodes(document["nodes"])
    print_rounds(document["history"])
    for event in document["events"][-8:]:
        told = escape(printable(event["sentence"]))
        console.print(f"[dim]{_ago(event['unix']):>12}[/dim]  {told}", highlight=False)


def print_heldout(found: dict[str, Any] | None) -> None:
    """The newest evaluation, one line."""
    if found is None:
        return
    sources = found["sources"]
    parts = ", ".join(f"{escape(printable(s['source']))} {s['loss']:.4f}" for s in sources)
    Console().print(
        f"held-out loss of version {found['version']}: [bold]{found['loss']:.4f}[/bold]"
        + (f" (perplexity {found['perplexity']:.4g})" if found["perplexity"] else "")
        + (f"; {parts}" if len(sources) > 1 else ""),
        highlight=False,
    )


def print_nodes(nodes: Sequence[dict[str, Any]]) -> None:
    """One row a node."""
    console = Console()
    if not nodes:
        console.print("No nodes yet: make an invite with 'talkoot-coordinator invite'.")
        return
    wide = console.width >= WIDE
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("node", no_wrap=True)
    table.add_column("name", overflow="fold")
    moved_titles = ("up", "down") if wide else ()
    for title in ("status", "state", "last seen", "given", "tokens/s", *moved_titles):
        table.add_column(title, no_wrap=True)
    for node in nodes:
        status = node["status"]
        if status == "admitted" and node["standing"] == "probation":
            status = "on probation"
        style = _STATUS_STYLES.get(status, "")
        table.add_row(
            node["node_id"],
            escape(printable(node["name"])),  # a stranger chose it
            f"[{style}]{status}[/]" if style else status,
            node["state"] or "—",
            _since(node["last_seen_unix"]),
            str(node["contributions"]),
            format_count(node["tokens_per_second"]),
            *(format_count(node[key]) + "B" for key in ("bytes_up", "bytes_down") if wide),
        )
    console.print(table)


def _machine(has: dict[str, Any]) -> str:
    """What a node said that it has, when it proved itself last; a stranger chose the names."""
    free, total = format_size(has["device_free_bytes"]), format_size(has["device_total_bytes"])
    parts = [f"{has['device']} {has['device_name']}: {free} free of {total}"]
    if has["device"] != "cpu":
        host = format_size(has["host_free_bytes"]), format_size(has["host_total_bytes"])
        parts.append("host {} free of {}".format(*host))
    parts.append(f"{has['cpu_count']} CPUs, {format_size(has['disk_free_bytes'])} of disk")
    details = (
        ("compute capability", has["compute_capability"]),
        ("driver", has["driver"]),
        ("torch", has["torch_version"]),
        ("talkoot", has["talkoot_version"]),
    )
    parts += [f"{what} {value}" for what, value in details if value]
    return escape(printable("machine " + ", ".join(parts)))


def print_record(document: dict[str, Any]) -> None:
    """A node's standing, then what it is made of, newest first."""
    console = Console()
    console.print(
        f"[bold]{escape(printable(document['name']))}[/bold] ({document['node_id']})  "
        f"{document['status']}, {document['standing']}: {escape(document['sentence'])}"
    )
    console.print(
        f"suspicion {document['suspicion']:.1f} of {document['quarantine_at']:.0f}, "
        f"{document['counted']} contributions counted in this standing"
    )
    if document["capability"] is not None:
        console.print(_machine(document["capability"]), highlight=False)
    rates = (("down", document["link_down"]), ("up", document["link_up"]))
    told = [f"{format_size(int(rate))}/s {way}" for way, rate in rates if rate is not None]
    if told:
        console.print(f"line {', '.join(told)}, as it says", highlight=False)
    if document["recipe"] is not None:
        fell = f", after memory ran out {document['falls']} times" if document["falls"] else ""
        console.print(f"recipe {escape(printable(document['recipe']))}{fell}")
    if document["proofs"]:
        table = Table("when", "recipe", "peak", "tokens/s", "taken", box=None)
        table.add_column("why", overflow="fold")
        for row in document["proofs"]:
            table.add_row(
                _ago(row["unix"]),
                escape(printable(row["recipe"])),
                format_size(row["peak_bytes"]),
                f"{row['tokens_per_second']:,.0f}",
                "yes" if row["accepted"] else "no",
                escape(row["sentence"]),
            )
        console.print(table)
    if document["evidence"]:
        table = Table("when", "round", "evidence", "points", box=None)
        table.add_column("why", overflow="fold")
        for row in document["evidence"]:
            table.add_row(
                _ago(row["unix"]),
                "—" if row["round"] is None else str(row["round"]),
                row["kind"],
                f"{row['points']:+.1f}",
                escape(printable(row["sentence"])),
            )
        console.print(table)
    if document["judgements"]:
        table = Table("round", "counted", "agreement", "judgement", box=None)
        table.add_column("why", overflow="fold")
        for row in document["judgements"]:
            table.add_row(
                str(row["round"]),
                "—" if row["influence"] is None else f"{row['influence']:.2f}",
                "—" if row["agreement"] is None else f"{row['agreement']:.2f}",
                row["code"],
                escape(row["sentence"]),
            )
        console.print(table)
    for row in document["validations"]:
        console.print(f"round {row['round']} {row['kind']}: {escape(row['sentence'])}")


def print_rounds(history: Sequence[dict[str, Any]]) -> None:
    """One row a round."""
    console = Console()
    if not history:
        console.print("No round is published yet.")
        return
    wide = console.width >= WIDE
    table = Table(box=None, padding=(0, 1, 0, 0))
    moved_titles = ("up", "update") if wide else ()
    for title in ("round", "loss", "held-out", "tokens", "nodes", *moved_titles, "seconds"):
        table.add_column(title, no_wrap=True)
    table.add_column("why it closed", overflow="fold")
    for row in history:
        bytes_moved = (row["bytes_up"], row["update_bytes"] or 0)
        why = row["reason"].removeprefix(f"Round {row['round']} closes").lstrip(": ")
        table.add_row(
            str(row["round"]),
            "—" if row["loss"] is None else f"{row['loss']:.4f}",
            "—" if row["heldout_loss"] is None else f"{row['heldout_loss']:.4f}",
            format_count(row["tokens"]),
            str(row["contributions"]),
            *(format_count(moved) + "B" for moved in bytes_moved if wide),
            f"{row['seconds']:.1f}",
            escape(why),
        )
    console.print(table)
