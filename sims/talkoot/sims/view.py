"""What the demo shows while it runs: a live screen on a terminal, plain lines anywhere else.

:func:`render` and :func:`changes` are pure: they turn a coordinator's status (the JSON of
``/api/v1/status``) into a picture and into lines. Any value of a status may be missing or null.
:class:`LiveView` is the thin shell that puts them on a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from talkoot.sims.figures import bytes_text, clean, count_text, loss_text, many, seconds_text
from talkoot.sims.view_parts import (
    event_style,
    events_panel,
    header,
    nodes_table,
    progress,
    style_of,
)

MAX_PHASE_LINES = 6
REFRESH_PER_SECOND = 4

Status = Mapping[str, Any]


def render(
    status: Status | None,
    *,
    phase_lines: Sequence[str],
    started_unix: float,
    now_unix: float,
    model: str = "",
) -> RenderableType:
    """Draw one picture of the run; fits 80 columns and is at its best from 100 on.

    Args:
        status: as the coordinator tells it, or ``None`` while there is no coordinator to ask.
        phase_lines: what the demo itself is doing, oldest first; the last few are shown.
        started_unix: when the demo started, seconds since the epoch.
        now_unix: now, seconds since the epoch.
        model: the model's name for people.
    """
    parts: list[RenderableType] = [header(status, max(0.0, now_unix - started_unix), model)]
    if status is not None:
        parts += [progress(status, now_unix), nodes_table(status)]
        if status.get("events"):
            parts.append(events_panel(status["events"], started_unix))
    lines = [clean(line) for line in phase_lines[-MAX_PHASE_LINES:]]
    if lines:
        parts.append(Text())
        parts += [Text(f" · {line}", style=style_of(line) or "dim") for line in lines[:-1]]
        parts.append(Text(f" · {lines[-1]}", style=style_of(lines[-1])))
    return Group(*parts)


def changes(old: Status | None, new: Status) -> list[tuple[str, str]]:
    """What a plain log says about the step from ``old`` to ``new``: (style, line), oldest first.

    One line for each new round, event, and node that came or went.
    """
    before: Status = old or {}
    lines: list[tuple[str, str]] = []
    if new.get("phase") and new.get("phase") != before.get("phase"):
        lines.append(("", f"phase: {clean(new['phase'])}"))

    known = {_event_key(event) for event in before.get("events") or ()}
    for event in new.get("events") or ():
        if _event_key(event) not in known:
            lines.append((event_style(event), clean(event.get("sentence") or event.get("kind"))))

    online = {node.get("node_id"): bool(node.get("online")) for node in before.get("nodes") or ()}
    for node in new.get("nodes") or ():
        is_online = bool(node.get("online"))
        if online.get(node.get("node_id"), False) != is_online:
            name = clean(node.get("name") or node.get("node_id"))
            lines.append(("", f"node {name} is {'online' if is_online else 'offline'}"))

    done = {row.get("round") for row in before.get("history") or ()}
    lines += [
        ("bold", _round_line(row, new.get("rounds_total")))
        for row in new.get("history") or ()
        if row.get("round") not in done
    ]
    return lines


def _event_key(event: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return event.get("unix"), event.get("kind"), event.get("sentence")


def _round_line(row: Mapping[str, Any], rounds_total: int | None) -> str:
    total = f" of {rounds_total}" if rounds_total else ""
    return (
        f"round {row.get('round')}{total}: loss {loss_text(row.get('loss'))}, "
        f"{count_text(row.get('tokens'))} tokens, "
        f"{many(row.get('contributions') or 0, 'contribution')}, "
        f"{bytes_text(row.get('bytes_up'))} up, update {bytes_text(row.get('update_bytes'))}, "
        f"{seconds_text(row.get('seconds'))}"
    )


class LiveView:
    """Shows a run while the ``with`` block lasts; call it from one thread.

    On a terminal the picture is redrawn a few times a second, so that clocks move; elsewhere (a
    pipe, a log, ``TERM=dumb``, a terminal without UTF-8) each change is one line.
    """

    def __init__(
        self,
        *,
        model: str = "",
        started_unix: float | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        self._started = clock() if started_unix is None else started_unix
        self._model = model
        self._status: Status | None = None
        self._lines: list[str] = []
        self._live: Live | None = None

    @property
    def is_live(self) -> bool:
        """Whether this is a screen, and not lines."""
        console = self._console
        return (
            console.is_terminal
            and not console.is_dumb_terminal
            and console.encoding.startswith("utf")
        )

    def say(self, line: str) -> None:
        """Tell what the demo itself is doing now."""
        self._lines = [*self._lines[-MAX_PHASE_LINES + 1 :], line]
        if self._live is None:
            self._print(style_of(line), clean(line))

    def update(self, status: Status | None) -> None:
        """Show a new status; ``None`` (nobody answered) keeps the last one."""
        if status is None:
            return
        if self._live is None:
            for style, line in changes(self._status, status):
                self._print(style, line)
        self._status = status

    def __enter__(self) -> Self:
        if self.is_live:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=REFRESH_PER_SECOND,
                vertical_overflow="ellipsis",
            )
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()  # draws the last picture, which stays on the screen
            self._live = None

    def _render(self) -> RenderableType:
        return render(
            self._status,
            phase_lines=self._lines,
            started_unix=self._started,
            now_unix=self._clock(),
            model=self._model,
        )

    def _print(self, style: str, line: str) -> None:
        elapsed = Text(f"[{seconds_text(max(0.0, self._clock() - self._started)):>12}] ")
        self._console.print(elapsed.append(line, style=style), soft_wrap=True, highlight=False)
