"""Whole simulated networks in Flower's engine on Ray: three starts of Ray in all."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from talkoot.client.home import Home
from talkoot.sims.cli import app
from talkoot.sims.compare.read import read_lines
from talkoot.sims.scenario import load_scenario
from talkoot.sims.virtual import session
from talkoot.sims.virtual.command import RunResult, run
from talkoot.sims.virtual.layout import Layout

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(900)  # a start of Ray is seconds, unless the machine is busy

TEXT = """
name = "small-town"
rounds = 3
days = 1
seed = 3

[model]
preset = "nano"
sequence_length = 64
micro_batch = 2

[corpus]
sources = ["{text}"]
block_tokens = 256
heldout_fraction = 0.4

[rules.round]
tokens_per_node = 512
deadline_seconds = 300
quorum = 3
min_nodes = 3

[rules.evaluation]
tokens = 2048

[[population]]
name = "homes"
device = "cpu-8"
link = "fibre-300"
count = 5
tokens_per_second = 10.0

[[population]]
name = "too-small"
device = "cpu-8"
count = 1
memory_gib = 0.2
tokens_per_second = 10.0

[[attackers]]
kind = "copy"
count = 1
population = "homes"

[[events]]
round = 2
leave = 0.2
back_after_hours = 0.01

[expect]
rounds = {{ min = 3 }}
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    root = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"test-run-{os.getpid()}"
    shutil.rmtree(root, ignore_errors=True)
    (root / "text").mkdir(parents=True)
    for name in ("argparse", "inspect"):
        shutil.copy(Path(sys.modules[name].__file__ or ""), root / "text")
    (root / "town.toml").write_text(TEXT.format(text=root / "text"), encoding="utf-8")
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(place: Path) -> RunResult:
    """Without an interruption, with two workers."""
    return run(
        load_scenario(place / "town.toml"), out=place / "two", work=place / "work2", workers=2
    )


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 480
    while not condition():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.05)


def test_real_training_lowers_the_held_out_loss_and_the_tables_say_who_did_what(
    whole: RunResult,
) -> None:
    figures = whole.figures
    assert whole.holds
    assert figures["rounds"] == 3
    assert figures["nodes"] == 6
    assert figures["nodes_that_fit"] == 5
    first, last = figures["first_loss"], figures["loss"]
    assert first is not None
    assert last is not None
    assert last < first
    assert whole.document["refused"][0][0].startswith("No recipe for a replica of this model fits")
    with whole.leases.open(encoding="utf-8", newline="") as file:
        accepted = [row for row in csv.DictReader(file) if row["answer"] == "accepted"]
    assert len(accepted) == sum(row["contributions"] for row in whole.rounds)
    keys = ("sent", "fetched", "trained", "encoded", "arrived", "answered")
    for row in accepted:
        moments = [float(row[key]) for key in keys]
        assert moments == sorted(moments)
        assert 0 <= float(row["influence"]) <= 1
    assert "Simulation small-town" in (whole.out / "report.html").read_text(encoding="utf-8")


def test_bytes_of_the_world_are_those_that_the_workers_metered(
    whole: RunResult, place: Path
) -> None:
    layout = Layout(place / "work2")
    for index, node in enumerate(n for n in whole.nodes if n["status"] != "refused"):
        counters = Home(layout.home(index)).counters()
        assert node["bytes_up"] <= counters.bytes_up
        if node["contributions"] == 3:
            assert node["bytes_up"] == counters.bytes_up


def test_a_killed_run_leaves_no_process_and_goes_on_to_the_same_bits_with_one_worker(
    whole: RunResult, place: Path
) -> None:
    work, out = place / "work1", place / "one"
    command = [str(Path(sys.executable).parent / "talkoot-sim"), "run", str(place / "town.toml")]
    command = [*command, "--out", str(out), "--work", str(work), "--workers", "1"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    world = work / "world.json"

    def in_round_two() -> bool:
        assert child.poll() is None
        if not world.exists():
            return False
        saved = json.loads(world.read_bytes())
        return (saved["round"], saved["attempt"]) == (2, 0)

    try:
        wait_for(in_round_two, "round 2 opened")
        (engine,) = psutil.Process(child.pid).children()
        assert len(session.members(engine.pid)) > 3  # Ray's processes are among them
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    wait_for(lambda: not session.members(engine.pid), "the engine's processes ended")
    again = run(load_scenario(place / "town.toml"), out=out, work=work, workers=1)
    assert again.weights_digest == whole.weights_digest
    assert [row["weights_digest"] for row in again.rounds] == [
        row["weights_digest"] for row in whole.rounds
    ]
    assert again.leases.read_bytes() == whole.leases.read_bytes()


def test_a_finished_run_is_not_run_again_and_its_expectations_decide_the_status(
    whole: RunResult, place: Path
) -> None:
    stricter = place / "stricter.toml"
    text = (place / "town.toml").read_text(encoding="utf-8")
    stricter.write_text(text.replace("min = 3 }\n", "min = 4 }\n"), encoding="utf-8")
    given = ["run", str(stricter), "--out", str(whole.out), "--work", str(place / "work2")]
    done = CliRunner().invoke(app, [*given, "--json"])
    assert done.exit_code == 1
    assert "rounds is 3 and was expected to be 4 or more" in done.stderr.replace("\n", " ")
    assert json.loads(done.stdout)["weights_digest"] == whole.weights_digest


def test_compare_reads_what_a_run_wrote(whole: RunResult) -> None:
    (line,) = read_lines([whole.out])
    assert line.kind == "run"
    assert line.figure("tokens") == whole.figures["tokens"]


def test_the_worked_example_of_the_page_says_what_it_found(
    whole: RunResult, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "simulation.md"
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in found if "import Scenario, run" in block]
    for told, here in (
        ('"campus", {"rounds": 3}', repr(str(place / "town.toml"))),
        ('"runs/notebook"', repr(str(whole.out))),
        ('"/dev/shm/notebook"', repr(str(place / "work2"))),
    ):
        assert told in block
        block = block.replace(told, here)
    exec(compile(block, str(page), "exec"), {})
    assert capsys.readouterr().out.split()[1:] == [whole.weights_digest, "True"]
