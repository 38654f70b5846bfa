"""The report's page: one file with everything in it, no script, nothing fetched. Pure.

All text that comes from a run (names, reasons, what the model wrote) is escaped.
"""

from __future__ import annotations

import math
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
from talkoot.sims.page import document, picture, table, tiles
from talkoot.sims.report_data import ReportData

_FP32_BITS = 32


def page(data: ReportData, light_png: bytes, dark_png: bytes) -> str:
    """The whole page; ``light_png`` and ``dark_png`` are the figure for either colour scheme."""
    return document(
        f"talkoot: {clean(data.run_id, cap=63)}",
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
        ),
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
    items = (
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
    return tiles(items)


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
    words = (
        f"Training loss of each round over tokens; held-out loss "
        f"{loss_text(data.heldout_loss_before)} before and {loss_text(data.heldout_loss_after)} "
        f"after; {many(len(data.kills), 'kill')} marked."
    )
    return picture(words, light_png, dark_png)


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
    return "<h2>Killed on purpose</h2>" + table(("what", "at", "whole again after"), rows)


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
    return "<h2>Rounds</h2>" + table(heads, rows)


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
    return "<h2>Nodes</h2>" + table(heads, rows, words=3)


def _software(data: ReportData) -> str:
    if not data.software:
        return ""
    versions = " · ".join(f"{name} {version}" for name, version in sorted(data.software.items()))
    return f'<h2>Made with</h2><p class="faint">{escape(clean(versions, cap=2000))}</p>'
