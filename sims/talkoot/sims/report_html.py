"""The report's page: one file with everything in it, no script, nothing fetched. Pure.

All text that comes from a run (names, reasons, what the model wrote) is escaped; the page's content
policy forbids everything but its own style and its own pictures.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

from talkoot.sims.figures import (
    bytes_text,
    clean,
    count_text,
    loss_text,
    many,
    seconds_text,
    times_smaller_text,
)
from talkoot.sims.report_data import ReportData

_FP32_BITS = 32

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1c2330;
  --faint: #5d6675; --line: #e3e6ec; --good: #14733b; --bad: #b3261e; --accent: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --paper: #151a22; --card: #1d232d; --ink: #e6e9ef;
  --faint: #9aa4b4; --line: #2b3340; --good: #5fd08e; --bad: #ff8a80; --accent: #79adff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans",
  sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .7rem; }
p { margin: .4rem 0; max-width: 46rem; }
.faint { color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem;
  margin: 1.6rem 0; }
@media (min-width: 48rem) { .tiles { grid-template-columns: repeat(3, 1fr); } }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem .9rem; }
.tile b { display: block; font-size: 1.45rem; font-weight: 650; line-height: 1.3; }
.tile span { color: var(--faint); font-size: .86rem; line-height: 1.35; display: block; }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 0; } img { width: 100%; height: auto; display: block; border-radius: .6rem;
  border: 1px solid var(--line); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--faint); background: var(--card); }
th, td { padding: .42rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; }
pre { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: .86rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem;
  margin: .5rem 0; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--accent); font-weight: 600; }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(data: ReportData, light_png: bytes, dark_png: bytes) -> str:
    """The whole page; ``light_png`` and ``dark_png`` are the figure for either colour scheme."""
    title = f"talkoot: {clean(data.run_id, cap=63)}"
    body = "\n".join(
        (
            f"<h1>{escape(_headline(data))}</h1>",
            f'<p class="faint">{escape(_summary(data))}</p>',
            _tiles(data),
            _figure(data, light_png, dark_png),
            _kills(data),
            _sample(data),
            _rounds(data),
            _nodes(data),
            _software(data),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _headline(data: ReportData) -> str:
    before, after = data.heldout_loss_before, data.heldout_loss_after
    nodes = many(data.nodes, "node")
    if after < before:
        return f"{nodes} taught one model: loss {loss_text(before)} → {loss_text(after)}"
    return f"{nodes} trained, and nothing was learnt: loss {loss_text(before)} → {loss_text(after)}"


def _summary(data: ReportData) -> str:
    return (
        f"Run {clean(data.run_id, cap=63)}: {clean(data.model, cap=80)}, "
        f"{data.parameters:,} parameters, {many(data.rounds, 'round')}, "
        f"{count_text(data.tokens)} tokens, {seconds_text(data.wall_seconds)}. Losses are nats per "
        "token on text that no node trained on."
    )


def _tiles(data: ReportData) -> str:
    improved = data.heldout_loss_after < data.heldout_loss_before
    after, before = data.heldout_loss_after, data.heldout_loss_before
    tiles = (
        (
            f"{loss_text(before)} → {loss_text(after)}",
            f"held-out loss; perplexity {_perplexity(before)} → {_perplexity(after)}",
            "good" if improved else "bad",
        ),
        (
            f"{data.bits_per_parameter_up:.3f}",
            "bits per parameter up, "
            f"{times_smaller_text(_FP32_BITS, data.bits_per_parameter_up)} smaller than fp32",
            "",
        ),
        (
            f"{data.bits_per_parameter_down:.3f}",
            "bits per parameter down, "
            f"{times_smaller_text(_FP32_BITS, data.bits_per_parameter_down)} smaller than fp32",
            "",
        ),
        (
            seconds_text(data.nontraining_seconds_per_round),
            "of a round is not training (median)",
            "",
        ),
        (
            "identical" if data.replicas_agree else "differ",
            "replicas, by the hash of their weights",
            "good" if data.replicas_agree else "bad",
        ),
        _survival(data),
    )
    cells = "".join(
        f'<div class="tile"><b class="{style}">{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small, style in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _survival(data: ReportData) -> tuple[str, str, str]:
    """What was killed and came back; without kills, what was done."""
    if not data.kills:
        return count_text(data.tokens), f"tokens in {seconds_text(data.wall_seconds)}", ""
    back = [k.recovery_seconds for k in data.kills if k.recovery_seconds is not None]
    if len(back) < len(data.kills):
        lost = len(data.kills) - len(back)
        return f"{lost} not back", f"of {len(data.kills)} that were killed on purpose", "bad"
    return (
        f"{len(back)} of {len(back)} back",
        f"killed on purpose; the slowest took {seconds_text(max(back))}",
        "good",
    )


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.3g}" if math.isfinite(loss) and loss < 50 else "–"


def _figure(data: ReportData, light_png: bytes, dark_png: bytes) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        for png in (light_png, dark_png)
    )
    words = (
        f"Training loss of each round over tokens; held-out loss "
        f"{loss_text(data.heldout_loss_before)} before and {loss_text(data.heldout_loss_after)} "
        f"after; {many(len(data.kills), 'kill')} marked."
    )
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(words)}"></picture></figure>'
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table of escaped text. The first ``words`` columns are words, the others are numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        opening = [f"<{tag}>" if i < words else f'<{tag} class="n">' for i in range(len(row))]
        return "".join(
            f"{start}{escape(text)}</{tag}>" for start, text in zip(opening, row, strict=True)
        )

    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _kills(data: ReportData) -> str:
    if not data.kills:
        return ""
    rows = [
        (
            clean(kill.what),
            seconds_text(kill.when_seconds),
            "not back" if kill.recovery_seconds is None else seconds_text(kill.recovery_seconds),
        )
        for kill in data.kills
    ]
    return "<h2>Killed on purpose</h2>" + _table(("what", "at", "whole again after"), rows)


def _sample(data: ReportData) -> str:
    load = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({data.export_dir!r})"
    )
    text = ""
    if data.sample_text:
        text = (
            f"<h2>What the model writes</h2><pre><b>{escape(data.sample_prompt)}</b>"
            f"{escape(data.sample_text)}</pre>"
        )
    return f"{text}<h2>The model</h2><pre>{escape(load)}</pre>"


def _rounds(data: ReportData) -> str:
    rows = [
        (
            str(row.round),
            loss_text(row.loss),
            f"{row.tokens:,}",
            str(row.contributions),
            bytes_text(row.bytes_up),
            bytes_text(row.update_bytes),
            seconds_text(row.seconds),
            seconds_text(row.training_seconds),
            "–" if row.version is None else str(row.version),
        )
        for row in data.history
    ]
    heads = (
        "round",
        "training loss",
        "tokens",
        "contributions",
        "sent up",
        "update",
        "took",
        "trained",
        "version",
    )
    return "<h2>Rounds</h2>" + _table(heads, rows)


def _nodes(data: ReportData) -> str:
    rows = [
        (
            clean(row.name) or "–",
            row.node_id,
            clean(row.status or "–"),
            str(row.contributions),
            count_text(row.tokens_per_second),
            bytes_text(row.bytes_up),
            bytes_text(row.bytes_down),
            times_smaller_text(4 * data.parameters * row.contributions, row.bytes_up or 0),
            "–" if row.version is None else str(row.version),
            (row.weights_digest or "–")[:12],
            "–" if row.restarts is None else str(row.restarts),
            "–" if row.healed is None else str(row.healed),
        )
        for row in data.node_rows
    ]
    heads = (
        "node",
        "id",
        "status",
        "contributions",
        "tokens/s",
        "sent",
        "received",
        "sent, vs fp32",
        "version",
        "weights",
        "restarts",
        "healed",
    )
    return "<h2>Nodes</h2>" + _table(heads, rows, words=3)


def _software(data: ReportData) -> str:
    if not data.software:
        return ""
    versions = " · ".join(f"{name} {version}" for name, version in sorted(data.software.items()))
    return f'<h2>Made with</h2><p class="faint">{escape(clean(versions, cap=2000))}</p>'
