"""Writing the report of a run: ``report.json`` for programs, ``loss.png`` and ``index.html``."""

from __future__ import annotations

import json
from pathlib import Path

from talkoot.protocol.files import explain_os_error, write_atomic
from talkoot.sims.report_data import ReportData
from talkoot.sims.report_html import page
from talkoot.sims.report_plot import DARK, LIGHT, draw_loss


def write_report(data: ReportData, out_dir: Path) -> Path:
    """Write the three files into ``out_dir`` (made if missing) and answer the path of index.html.

    Each file is whole or absent, and ``report.json`` comes first: it does not depend on the figure.
    Raises :class:`~talkoot.protocol.errors.StateError` or
    :class:`~talkoot.protocol.errors.CapacityError` when ``out_dir`` cannot be written, and
    :class:`~talkoot.protocol.errors.ConfigError` when matplotlib is missing.
    """
    text = json.dumps(data.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    index = out_dir / "index.html"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(out_dir / "report.json", text.encode(errors="replace"))
        light = draw_loss(data, LIGHT)
        write_atomic(out_dir / "loss.png", light)
        html = page(data, light, draw_loss(data, DARK))
        write_atomic(index, html.encode(errors="replace"))
    except OSError as err:
        raise explain_os_error(err, "writing the report", out_dir) from err
    return index
