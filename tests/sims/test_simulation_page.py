"""docs/simulation.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "simulation.md"


def test_the_worked_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in found if "import Scenario, plan" in block]
    assert blocks  # that of run is in test_run_engine.py
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["2", "4", "8"]
    assert float(lines[0].split()[0]) > 1e8
