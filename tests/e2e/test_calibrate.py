"""A small real network beside its simulation: bytes agree, and a wrong line is found."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from talkoot.sims.calibration.compare import compare
from talkoot.sims.calibration.run import against, live
from talkoot.sims.scenario import Scenario, load_scenario
from talkoot.sims.wan import impossible

pytest.importorskip("ray")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    text = tmp_path / "text"
    text.mkdir()
    for name in ("argparse", "inspect", "typing"):
        shutil.copy(Path(sys.modules[name].__file__ or ""), text)
    return load_scenario(
        "loopback-2",
        {
            "rounds": 4,
            "corpus.sources": [str(text)],
            "corpus.block_tokens": 2048,
            "corpus.heldout_fraction": 0.4,
            "rules.round.tokens_per_node": 16_384,
            "rules.evaluation.every": 0,
        },
    )


def test_bytes_of_real_nodes_are_those_of_the_simulation_and_a_wrong_line_is_found(
    scenario: Scenario, tmp_path: Path
) -> None:
    real, lines = live(scenario, tmp_path, shaped=impossible() is None, say=print)
    measured, simulated, planned = against(
        scenario, real, lines, out=tmp_path / "right", seeds=1, say=print
    )
    assert planned is not None
    assert [row.round for row in real.rounds] == [1, 2, 3, 4]
    found = compare(real, simulated, planned.round_seconds)
    for row in found.rows[1:]:
        # Not the bar of 10 %: on a busy machine a node asks and reports oftener in a round.
        assert abs(row.difference) < 0.3, row
    assert real.tokens == pytest.approx(simulated[0].tokens, rel=0.3)

    slow = [type(line)(0.02, 0.05, line.rtt_ms) for line in lines]  # kilobits, and not megabits
    _, wrong, _ = against(scenario, real, slow, out=tmp_path / "wrong", seeds=1, say=print)
    told = compare(real, wrong, None)
    assert told.rows[0].difference > 0.5
    assert "a round: simulated +" in told.broken[0]
    assert measured.population[0].up_mbit == lines[0].up_mbit
