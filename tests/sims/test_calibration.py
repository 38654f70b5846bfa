"""Real beside simulated: the comparison, what it refuses, and the lines between real nodes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from talkoot.protocol.errors import ConfigError
from talkoot.server.config import dump_config, parse_config
from talkoot.sims.calibration.compare import BAR, FALSE_ALARMS, Losses, compare
from talkoot.sims.calibration.line import Found, measure, stream_bytes
from talkoot.sims.calibration.real import (
    NodeSeen,
    RoundSeen,
    Seen,
    insist_small,
    listens,
    load,
    names_of,
    real_config,
    save,
)
from talkoot.sims.calibration.report import print_calibration, write_report
from talkoot.sims.calibration.run import Calibration, as_measured, said_lines, seen_of
from talkoot.sims.cli import app
from talkoot.sims.scenario import Scenario, load_scenario
from talkoot.sims.virtual.layout import Profile
from talkoot.sims.wan import FAR, Line, Wan, impossible

SERVE = """
import socket, sys
server = socket.socket()
server.bind(("127.0.0.1", 0))
print("bound", flush=True)
sys.stdin.readline()
server.listen()
print("listens", flush=True)
sys.stdin.read()
"""
PARTS = {"training": 5.0, "around": 1.0, "closing": 0.2, "opening": 0.0}


def the(**overrides: object) -> Scenario:
    return load_scenario("loopback-2", overrides)


def seen(
    turn: float = 10.0,
    up: float = 1000.0,
    down: float = 9000.0,
    losses: tuple[float, ...] = (3.0, 2.5, 2.0),
    heldout: bool = True,
) -> Seen:
    rounds = tuple(
        RoundSeen(n + 1, n * turn, n * turn + 9, (n + 1) * turn, loss, loss if heldout else None)
        for n, loss in enumerate(losses)
    )
    nodes = tuple(NodeSeen(f"home-{n}", 5000.0, 0.02, up, down) for n in range(2))
    return Seen(rounds, nodes, 1000, 5.0, dict(PARTS))


@given(
    real=st.floats(1, 1e4),
    ratio=st.floats(0.5, 2.0).filter(lambda r: abs(abs(r - 1) - BAR) > 1e-6),
)
def test_a_round_is_within_the_bar_exactly_when_it_is_a_tenth_off_or_less(
    real: float, ratio: float
) -> None:
    found = compare(seen(turn=real), [seen(turn=real * ratio)] * 2, None)
    assert found.rows[0].difference == pytest.approx(ratio - 1, abs=1e-9)
    assert found.holds == (abs(ratio - 1) < BAR)


def test_each_missed_bar_is_a_sentence_that_names_figure_and_difference() -> None:
    wrong = seen(turn=13.0, up=1200.0, losses=(3.0, 2.5, 1.0))
    found = compare(seen(), [wrong, wrong], 11.0)
    assert found.broken == [
        "a round: simulated +30.0% off the real network (the bar is 10%).",
        "home-0, up a round: simulated +20.0% off the real network (the bar is 10%).",
        "home-1, up a round: simulated +20.0% off the real network (the bar is 10%).",
        "held-out losses: the real network's mean is 0.333 nats from the simulations'; one more "
        "seed would be within 0.000 in 95 of 100 cases.",
    ]
    assert found.rows[0].planned == 11.0
    assert json.loads(json.dumps(found.to_json()))["holds"] is False


def with_mean(mean: float) -> Seen:
    return seen(losses=(mean + 0.5, mean, mean - 0.5))


def test_losses_may_be_as_far_from_the_seeds_as_one_more_seed_and_no_further() -> None:
    seeds = [with_mean(mean) for mean in (2.4, 2.5, 2.6)]  # 0.1 is their standard deviation
    bar = 4.303 * 0.1 * (1 + 1 / 3) ** 0.5
    assert compare(with_mean(2.5), seeds, None).losses.bar == pytest.approx(bar)
    for way in (1, -1):
        assert compare(with_mean(2.5 + way * (bar - 0.001)), seeds, None).losses.holds
        assert not compare(with_mean(2.5 + way * (bar + 0.001)), seeds, None).losses.holds
    assert not compare(with_mean(2.6), seeds[:1], None).losses.holds


@pytest.mark.parametrize("count", [3, 6, 20])
def test_a_simulation_that_is_right_misses_the_bar_of_losses_as_often_as_is_said(
    count: int,
) -> None:
    rng = np.random.default_rng(count)
    draws = rng.normal(2.5, 0.1, (2000, count + 1))
    missed = sum(
        not Losses("held-out", (1,), (row[0],), tuple((one,) for one in row[1:])).holds
        for row in draws.tolist()
    )
    assert missed / len(draws) == pytest.approx(FALSE_ALARMS, abs=0.015)


def test_without_two_common_evaluations_training_losses_are_compared() -> None:
    found = compare(seen(), [seen(heldout=False), seen()], None)
    assert found.losses.kind == "training"
    assert found.losses.rounds == (1, 2, 3)


def test_networks_of_other_nodes_or_rounds_are_not_compared() -> None:
    other = dataclasses.replace(seen(), nodes=seen().nodes[:1])
    with pytest.raises(ValueError, match="other nodes"):
        compare(seen(), [other], None)
    with pytest.raises(ValueError, match="other rounds"):
        compare(seen(), [seen(losses=(3.0, 2.0))], None)
    with pytest.raises(ValueError, match="nothing"):
        compare(seen(), [], None)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("campus", {}, "it has 24 nodes, and 1 to 8 real ones run here"),
        ("loopback-2", {"rounds": 2}, "it needs `rounds`, 3 or more"),
        ("loopback-2", {"events": [{"round": 2, "leave": 0.5}]}, "are simulated only"),
        ("loopback-2", {"rules.round.min_nodes": 1, "rules.round.quorum": 1}, "min_nodes to 2"),
    ],
)
def test_what_cannot_be_lived_through_here_is_refused(
    name: str, changes: dict[str, object], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        insist_small(load_scenario(name, changes))


def test_a_process_listens_once_it_takes_connections() -> None:
    assert not listens(None)
    child = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "bound\n"
        assert not listens(child.pid)
        child.stdin.write("listen\n")
        child.stdin.flush()
        assert child.stdout.readline() == "listens\n"
        assert listens(child.pid)
        child.stdin.close()
    assert not listens(child.pid)


def test_the_command_refuses_in_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["calibrate", "campus", "--out", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert "24 nodes" in done.exception.sentence
    assert list(tmp_path.iterdir()) == []


def test_the_operators_configuration_is_the_scenarios_own() -> None:
    config = real_config(the(), host="10.77.0.1")
    assert parse_config(dump_config(config)) == config
    assert config.round == the().rules.round
    assert config.network.public_host == "10.77.0.1"


def test_what_is_simulated_has_each_nodes_measured_speed_and_line() -> None:
    lines = [Found(1.5, 6.0, 31.0), Found(1.6, 7.0, 32.0)]
    found = as_measured(the(), seen(), lines)
    assert names_of(the()) == [entry.name for entry in found.population] == ["home-0", "home-1"]
    second = found.classes(111_000)[1]
    assert second.tokens_per_second == 5000.0
    assert (second.link.up_mbit, second.link.down_mbit, second.link.latency_ms) == (1.6, 7.0, 32.0)
    Scenario.model_validate(found.model_dump(mode="json"))


def test_a_simulation_is_seen_as_a_real_network_is(tmp_path: Path) -> None:
    scenario = as_measured(the(), seen(), [Found(2.0, 8.0, 30.0)] * 2)
    leases = tmp_path / "leases.csv"
    head = "round,population,sent,fetched,encoded,arrived,answered,bytes_up,bytes_down,answer"
    rows = [
        f"{n},home-{k},{n * 10},{n * 10 + 1},{n * 10 + 6},{n * 10 + 7},{n * 10 + 7},{n * 100},"
        f"{n * 1000},accepted"
        for n in (1, 2, 3)
        for k in (0, 1)
    ]
    leases.write_text("\n".join([head, *rows]) + "\n")
    document = {
        "scenario": scenario.model_dump(mode="json"),
        "figures": {"tokens": 12},
        "first_loss": 5.5,
        "messages": {"seconds": 1.0, "report": 50, "reply": 70, "claim": 20, "verdict": 5},
        "rounds": [
            {
                "round": n,
                "opened": n * 10.0,
                "closed": n * 10 + 7.0,
                "published": n * 10 + 8.0,
                "loss": 3.0,
                "heldout": None,
            }
            for n in (1, 2, 3)
        ],
    }
    found = seen_of(document, leases)
    assert found.round_seconds == 10.0
    # Pushed from round 1 to 2, fetched for rounds 2 and 3; a report a second, and a claim.
    assert found.nodes[0].bytes_up == 150 + 10 * 50 + 20
    assert found.nodes[0].bytes_down == 2500 + 10 * 70 + 5
    assert found.parts == {"training": 5.0, "around": 2.0, "closing": 1.0, "opening": 2.0}


def test_what_was_measured_is_read_back_as_it_was(tmp_path: Path) -> None:
    save(seen(), tmp_path / "real.json")
    assert load(tmp_path / "real.json") == seen()


def test_the_report_is_a_page_and_a_table_that_say_what_was_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    wrong = [seen(turn=13.0), seen(turn=13.0, losses=(3.1, 2.6, 2.1))]
    found = Calibration(
        scenario=the(),
        simulated_as=the(),
        real=seen(),
        simulated=tuple(wrong),
        planned=seen(turn=12.0),
        comparison=compare(seen(), wrong, 12.0),
        lines=(Found(2.0, 8.0, 30.0), Found(2.0, 8.0, 30.0)),
        shaped=False,
        load=(6.0, 7.0),
        cores=2,
    )
    page = write_report(found, tmp_path).read_text(encoding="utf-8")
    assert "a round: simulated +30.0% off" in page
    assert "plain loopback" in page
    assert "load 6.0 on 2 cores" in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    print_calibration(found, Console(width=140))
    told = capsys.readouterr().out
    assert "10%, missed" in told
    assert "12.00 s" in told
    assert json.loads(json.dumps(found.to_json(), default=str))["planned_round_seconds"] == 12.0


@given(st.floats(1e-3, 1e5))
def test_a_measurement_moves_a_bounded_number_of_bytes(mbit: float) -> None:
    assert 2**16 <= stream_bytes(mbit) <= 2**26


@given(st.integers(0, 2**31), st.integers(1, 10_000))
def test_a_node_is_disturbed_in_each_round_alike_in_every_process(seed: int, number: int) -> None:
    calm = Profile(index=3, name="n", population="p", recipe="fp32", tokens_per_second=10.0)
    noisy = calm.model_copy(update={"speed_noise": 0.03, "seed": seed})
    assert calm.speed_in(number) == 10.0
    assert noisy.speed_in(number) == Profile(**noisy.model_dump()).speed_in(number)
    assert 8.0 < noisy.speed_in(number) < 12.0


@pytest.mark.skipif(impossible() is not None, reason="lines need root, ip and /dev/net/tun")
def test_each_volunteer_has_a_line_of_its_own_to_one_address() -> None:
    said = [Line(4, 8, 20, 0.0), Line(2, 4, 40, 0.0)]
    with Wan(said) as wan:
        found = [
            measure(wan.near_of(place), wan.far, FAR, line.up_mbit, line.down_mbit)
            for place, line in enumerate(said)
        ]
    for line, one in zip(said, found, strict=True):  # no machine is fast enough to beat a line
        assert one.up_mbit < 1.05 * line.up_mbit
        assert one.down_mbit < 1.05 * line.down_mbit
        assert one.rtt_ms > 0.99 * line.rtt_ms


def test_the_lines_of_real_nodes_are_those_that_the_scenario_says() -> None:
    assert [(one.up_mbit, one.down_mbit, one.rtt_ms, one.loss) for one in said_lines(the())] == [
        (2.0, 8.0, 30.0, 0.0)
    ] * 2
