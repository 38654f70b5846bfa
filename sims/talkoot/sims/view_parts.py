"""The parts of the live view's picture. Pure: a status in, something that rich can draw out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from talkoot.sims.figures import (
    bytes_text,
    clean,
    count_text,
    loss_text,
    seconds_text,
    sparkline,
    times_smaller_text,
)

WIDE = 98
"""Columns from which on the table of nodes shows everything."""
MAX_EVENTS = 6
MAX_NODES = 16
_FP32_BYTES = 4

_STATE_STYLES = {
    "training": "green",
    "proving": "cyan",
    "syncing": "cyan",
    "pushing": "magenta",
    "paused": "yellow",
    "leaving": "yellow",
    "offline": "bold red",
}
_MENDED = re.compile(r"\b(recover|return|resum|back|heal|admitted|finished|identical)", re.I)
_BROKEN = re.compile(
    r"\b(kill|died|dead|crash|lost|offline|banned|refus|reject|fail|missed|differ)", re.I
)
_TAKEN_UP = re.compile(r"\b(restart|ended|reopen)", re.I)


def style_of(words: str) -> str:
    """Green for what was mended, red for what broke, yellow for what is being taken up again."""
    if _MENDED.search(words):
        return "bold green"
    if _BROKEN.search(words):
        return "bold red"
    return "yellow" if _TAKEN_UP.search(words) else ""


def event_style(event: Mapping[str, Any]) -> str:
    """The style of an event, by its kind."""
    return style_of(str(event.get("kind") or ""))


def header(status: Mapping[str, Any] | None, elapsed_seconds: float, model: str) -> RenderableType:
    """Who we are, which run and model this is, and for how long it has been going."""
    told: Mapping[str, Any] = status or {}
    left = Text(" talkoot", style="bold cyan", overflow="ellipsis", no_wrap=True)
    for part in (
        clean(told.get("run_id") or ""),
        clean(model),
        f"{count_text(told['parameters'])} parameters" if told.get("parameters") else "",
    ):
        if part:
            left.append("  ·  ", style="dim not bold").append(part, style="default not bold")
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(left, Text(f"{seconds_text(elapsed_seconds)} ", style="bold"))
    return grid


def progress(status: Mapping[str, Any], now_unix: float) -> RenderableType:
    """The run's progress: rounds, loss, tokens, in two lines."""
    history = status.get("history") or ()
    total = status.get("rounds_total") or 0
    # A round publishes one version, so the version counts rounds; the history is only the last few.
    done = status.get("version") or len(history)
    phase = clean(status.get("phase") or "waiting")
    of_total = f" of {total}" if total else ""
    if phase in {"training", "closing"} and status.get("round") is not None:
        now = f"round {status['round']}{of_total}"
    else:
        now = f"{done}{of_total} rounds done"
    words = Text(f"{now}, ").append(phase, style="bold green" if phase == "finished" else "bold")
    deadline = status.get("deadline_unix")
    if phase == "training" and deadline and deadline > now_unix:
        words.append(f", closes in {seconds_text(deadline - now_unix)} at the latest", style="dim")

    losses = [float(row["loss"]) for row in history if row.get("loss") is not None]
    loss = Text(sparkline(losses, 30), style="cyan")
    if losses:
        loss.append(f"  {loss_text(losses[0])} → ", style="dim")
        loss.append(loss_text(losses[-1]), style="bold")
    else:
        loss.append("no round yet", style="dim")
    loss.append(f"    {count_text(status.get('tokens_committed'))} tokens", style="default")
    if status.get("version") is not None:
        loss.append(f"  ·  version {status['version']}", style="dim")
        loss.append(f"  {clean(status.get('weights_digest') or '')[:8]}", style="dim")

    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=7, style="dim", justify="right")
    grid.add_column(width=30)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(total=max(1, total or done), completed=min(done, total or done), width=30)
    grid.add_row("rounds", bar, words)
    outer = Table.grid(expand=True)
    outer.add_row(grid)
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(width=7, style="dim", justify="right")
    line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    line.add_row("loss", loss)
    outer.add_row(line)
    return Panel(outer, box=box.HORIZONTALS, border_style="dim", padding=0)


@dataclass(frozen=True)
class _NodesTable:
    """The nodes; a narrow terminal is shown fewer columns, not broken ones."""

    status: Mapping[str, Any]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE
        table = Table(box=None, expand=True, header_style="dim", padding=(0, 1), pad_edge=True)
        table.add_column("node", ratio=1, no_wrap=True, overflow="ellipsis", min_width=8)
        table.add_column("state", no_wrap=True, width=8)
        table.add_column("steps", no_wrap=True, width=20 if wide else 8)
        table.add_column("loss", justify="right", no_wrap=True)
        table.add_column("tok/s", justify="right", no_wrap=True)
        table.add_column("sent", justify="right", no_wrap=True)
        if wide:
            table.add_column("received", justify="right", no_wrap=True)
        table.add_column("vs fp32" if not wide else "sent, vs fp32", justify="right", no_wrap=True)
        nodes = self.status.get("nodes") or ()
        for node in nodes[:MAX_NODES]:
            table.add_row(*self._row(node, wide))
        yield table
        if len(nodes) > MAX_NODES:
            yield Text(f" … and {len(nodes) - MAX_NODES} more", style="dim")
        if not nodes:
            yield Text(" no node has joined yet", style="dim")

    def _row(self, node: Mapping[str, Any], wide: bool) -> list[RenderableType]:
        online = node.get("online")
        state = clean(node.get("state") or node.get("status") or "–")
        if online is False:
            state = "offline"
        elif node.get("status") in {"refused", "banned"}:
            state = str(node["status"])
        name = Text(clean(node.get("name") or node.get("node_id") or "–"))
        if node.get("restarts"):
            name.append(f" ↻{node['restarts']}", style="yellow")
        cells: list[RenderableType] = [
            name,
            Text(state, style=_STATE_STYLES.get(state, "dim")),
            _steps(node, wide),
            loss_text(node.get("loss")),
            count_text(node.get("tokens_per_second")),
            bytes_text(node.get("bytes_up")),
        ]
        if wide:
            cells.append(bytes_text(node.get("bytes_down")))
        dense = (
            _FP32_BYTES * (self.status.get("parameters") or 0) * (node.get("contributions") or 0)
        )
        ratio = times_smaller_text(dense, node.get("bytes_up") or 0)
        cells.append(Text(ratio if ratio == "–" else f"{ratio} smaller" if wide else ratio))
        return cells


def _steps(node: Mapping[str, Any], wide: bool) -> RenderableType:
    step, steps = node.get("step") or 0, node.get("steps") or 0
    if not steps:
        return Text("–", style="dim")
    count = f"{min(step, steps)}/{steps}"
    if not wide:
        return Text(count)
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=steps, completed=min(step, steps), width=10), Text(count))
    return grid


def nodes_table(status: Mapping[str, Any]) -> RenderableType:
    """A row for each node: what it is doing, how fast, and what it has sent."""
    return _NodesTable(status)


def events_panel(events: Sequence[Mapping[str, Any]], started_unix: float) -> RenderableType:
    """The last few events with the second at which they happened, newest last."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(justify="right", style="dim", no_wrap=True, width=12)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    ordered = sorted(events, key=lambda event: event.get("unix") or 0.0)
    for event in ordered[-MAX_EVENTS:]:
        unix = event.get("unix")
        when = "" if unix is None else seconds_text(max(0.0, unix - started_unix))
        sentence = clean(event.get("sentence") or event.get("kind") or "")
        grid.add_row(when, Text(sentence, style=event_style(event)))
    return Panel(grid, box=box.HORIZONTALS, border_style="dim", padding=0)
