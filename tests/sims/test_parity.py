"""Parity: the measure is what the issue says, work is never done twice, and bad input is told."""

from __future__ import annotations

import io
import json
import math
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.model import build_model, config_bytes, preset
from talkoot.sims.cli import app
from talkoot.sims.parity.command import parity_options
from talkoot.sims.parity.options import Arm, ParityOptions, base_config, horizons, parse_arm
from talkoot.sims.parity.report import draw, page, print_parity, rows
from talkoot.sims.parity.result import Curve, Measured, Point, summarise
from talkoot.sims.parity.run import make_worlds, profiles, run_parity
from talkoot.sims.report_plot import LIGHT

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [str(STDLIB / name) for name in ("argparse.py", "typing.py")]


def options(out: Path, *arms: str, seeds: tuple[int, ...] = (0,), rounds: int = 2) -> ParityOptions:
    base = base_config(
        model={"preset": "nano"},
        sources=TEXTS,
        tokenizer=None,
        nodes=2,
        rounds=rounds,
        steps=2,
        batch=2,
        length=32,
        learning_rate=4e-3,
    )
    parsed = tuple(parse_arm(text) for text in arms) or (Arm("defaults"),)
    return ParityOptions(
        base=base, arms=parsed, nodes=2, rounds=rounds, seeds=seeds, heldout_tokens=512, out=out
    )


def curve(kind: str, *losses: float) -> Curve:
    points = tuple(Point(h, h * 256, loss) for h, loss in zip((1, 2), losses, strict=True))
    return Curve(kind, 1000, points, (0.1, 0.18), (0.5, 0.7), 15, 3.0, 2.0)


def measured(arm: Arm, seed: int, one: float, ddp: float, net: float) -> Measured:
    curves = {"one": (4.0, one), "ddp": (4.0, ddp), "net": (4.0, net)}
    return Measured(arm, seed, {kind: curve(kind, *losses) for kind, losses in curves.items()})


def test_captured_share_is_one_for_a_data_centre_and_nought_for_a_node_alone() -> None:
    arm = Arm("a")
    assert measured(arm, 0, 3.0, 2.0, 2.0).share(2) == 1
    assert measured(arm, 0, 3.0, 2.0, 3.0).share(2) == 0
    assert measured(arm, 0, 3.0, 2.0, 2.25).share(2) == 0.75
    assert measured(arm, 0, 3.0, 2.0, 3.5).share(2) == -0.5
    # Where all nodes together learn no more than one, nothing can be captured.
    assert math.isnan(measured(arm, 0, 2.0, 2.0, 2.0).share(2))


def test_parity_json_holds_losses_share_bits_and_seeds_by_arm_and_horizon(tmp_path: Path) -> None:
    opts = options(tmp_path, seeds=(0, 1))
    runs = [measured(opts.arms[0], s, 3.0, 2.0, net) for s, net in ((0, 2.2), (1, 2.4))]
    data = json.loads(json.dumps(summarise(opts, runs)))
    arm = data["arms"][0]
    assert (arm["seeds"], arm["rounds"], arm["inner_steps"]) == ([0, 1], [2, 2], 15)
    assert arm["bits_up"] == pytest.approx(0.14)
    assert arm["bits_down"] == pytest.approx(0.6)
    assert arm["overhead"] == pytest.approx(0.5)
    last = arm["horizons"][-1]
    assert last["round"] == 2
    assert last["loss_net"]["by_seed"] == [2.2, 2.4]
    assert last["share"]["mean"] == pytest.approx(0.7)
    assert (last["share"]["low"], last["share"]["high"]) == pytest.approx((0.6, 0.8))
    # At the first horizon nobody differs: the share is not known, and says so.
    assert arm["horizons"][0]["share"]["mean"] is None
    bars = {bar["name"]: bar["holds"] for bar in data["bars"]}
    assert bars == {
        "captured-share": False,
        "bits-up": True,
        "inner-steps": True,
        "loss-over-ddp": False,
    }
    assert rows(data, every_horizon=False)[0][5] == "0.70 (0.60 … 0.80)"
    assert draw(data, LIGHT).startswith(b"\x89PNG")
    assert "<script" not in page(data, b"", b"")


def test_other_arms_are_held_to_the_bar_of_what_they_are(tmp_path: Path) -> None:
    opts = options(
        tmp_path,
        "name=default",
        "name=[red]odd,nodes.speeds=[1, 8]",
        "name=ten times,uplink.keep=512",
        "name=dense,uplink.kind=dense",
        "name=other,outer.learning_rate=0.9",
    )
    bits = (0.14, 0.14, 1.2, 32.0, 0.14)
    runs = [
        Measured(m.arm, 0, {**m.curves, "net": replace(m.curves["net"], bits_up=(up, up))})
        for m, up in zip((measured(arm, 0, 3.0, 2.0, 2.2) for arm in opts.arms), bits, strict=True)
    ]
    data = summarise(opts, runs)
    held = {(b["arm"], b["bar"]): b["holds"] for b in data["bars"] if b["name"] == "captured-share"}
    # Others than these are only compared: nobody asked a share of a dense network.
    assert held == {("default", 0.85): False, ("[red]odd", 0.75): True, ("ten times", 0.95): False}
    shown = io.StringIO()
    print_parity(data, Console(file=shown, width=140))
    assert shown.getvalue().count("[red]odd") == 2  # in the table, and at its bar


def test_horizons_are_dense_at_first_and_end_with_the_run() -> None:
    assert horizons(1) == (1,)
    assert horizons(100)[:6] == (1, 2, 5, 10, 15, 20)
    assert horizons(100)[-1] == 100


def test_an_arm_is_written_as_keys_of_the_configuration_and_of_its_nodes() -> None:
    arm = parse_arm("name=odd,outer.learning_rate=1.5,nodes.speeds=[1, 8],nodes.dropout=0.3")
    assert (arm.name, arm.values) == ("odd", (("outer.learning_rate", 1.5),))
    assert (arm.nodes.speeds, arm.nodes.dropout) == ((1, 8), 0.3)
    assert parse_arm("uplink.kind=dense").values == (("uplink.kind", "dense"),)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("outer", "key=value"),
        ("nodes.dropout=2", "nodes.dropout"),
        ("nodes.spede=[1]", "nodes.spede"),
        ("outer.learning_rte=1", "learning_rate"),
        ("uplink.keep=0", "uplink.keep"),
    ],
)
def test_a_bad_arm_is_told_in_one_sentence_before_any_work(
    arm: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        options(tmp_path, arm)
    assert said in caught.value.sentence
    assert list(tmp_path.iterdir()) == []


def test_arms_share_their_measures_and_only_what_is_missing_is_run(tmp_path: Path) -> None:
    said: list[str] = []
    first = run_parity(options(tmp_path, "name=a"), said.append)
    assert [line.split(",")[0] for line in said] == ["one"] * 2 + ["ddp"] * 2 + ["a"] * 2
    said.clear()
    both = run_parity(options(tmp_path, "name=a", "name=b,outer.learning_rate=1.5"), said.append)
    assert [line.split(",")[0] for line in said] == ["b"] * 2
    assert both[0].curves == first[0].curves
    assert both[1].curves["ddp"] == first[0].curves["ddp"]
    assert both[1].curves["net"].points != first[0].curves["net"].points


def test_an_arm_that_was_killed_goes_on_from_its_last_round_and_ends_the_same(
    tmp_path: Path,
) -> None:
    def dies(line: str) -> None:
        if line.startswith("defaults, seed 0: round 1,"):
            raise KeyboardInterrupt

    whole = run_parity(options(tmp_path / "whole"), lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        run_parity(options(tmp_path / "killed"), dies)
    said: list[str] = []
    again = run_parity(options(tmp_path / "killed"), said.append)
    assert [line.split(",")[1] for line in said] == [" seed 0: round 2"]
    assert again[0].curves["net"].points == whole[0].curves["net"].points
    assert again[0].curves["net"].bits_up == whole[0].curves["net"].bits_up


def test_a_network_that_was_warmed_up_begins_where_the_measures_are_by_then(
    tmp_path: Path,
) -> None:
    # Rounds 1 and 2 of the schedule are the coordinator's: 2 leases' worth of steps.
    arm = "name=warm,warm_up.tokens=256,inner.warmup_tokens=512"
    cold, warm = run_parity(
        options(tmp_path, "inner.warmup_tokens=512", arm, rounds=3), lambda _: None
    )
    opts = options(tmp_path, arm, rounds=3)
    assert opts.horizons == (1, 2, 3)
    net, one = warm.curves["net"], warm.curves["one"]
    assert [p.tokens for p in net.points] == [p.tokens for p in one.points]
    assert len(net.bits_up) == 1
    assert len(cold.curves["net"].bits_up) == 3
    assert cold.curves["one"] == one
    assert cold.curves["ddp"] == warm.curves["ddp"]
    world = make_worlds(opts, opts.arms[0], 0)[1]
    assert [p.loss for p in net.points[:2]] == list(world.before)
    assert world.spec().inner.start_tokens == 512
    with pytest.raises(ConfigError, match="begins when all 2 rounds are over"):
        options(tmp_path, arm, rounds=2)


def test_unequal_nodes_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    arm = "nodes.speeds=[1, 4],nodes.dropout=0.3,nodes.own_text=true"
    opts = options(tmp_path, arm)
    assert [(p.speed, p.dropout, p.shard) for p in profiles(opts, opts.arms[0])] == [
        (1, 0.3, 0),
        (4, 0.3, 1),
    ]
    (done,) = run_parity(opts, lambda _: None)
    due = [h * opts.round_tokens for h in opts.horizons]
    for kind in ("one", "ddp"):
        assert [p.tokens for p in done.curves[kind].points] == due
    assert all(p.tokens >= d for p, d in zip(done.curves["net"].points, due, strict=True))


def test_a_pretrained_model_starts_from_its_own_weights(tmp_path: Path) -> None:
    config = {**preset("nano"), "vocab_size": 260}
    model = build_model(config, seed=3, device="cpu")
    source = tmp_path / "model"
    model.save_pretrained(source)  # type: ignore[operator]
    (source / "config.json").write_bytes(config_bytes(config))
    with pytest.raises(ConfigError):  # its tokenizer is not there
        run_parity(
            parity_options(
                model=str(source),
                config=None,
                arms=[],
                seeds=[0],
                nodes=2,
                rounds=1,
                steps=1,
                batch=1,
                length=32,
                learning_rate=None,
                sources=TEXTS,
                heldout_tokens=64,
                out=tmp_path / "out",
                work=None,
            ),
            lambda _: None,
        )
    toml = tmp_path / "config.toml"
    toml.write_text(f"""
[model]
pretrained = "{source}"
sequence_length = 32
micro_batch = 2
[corpus]
sources = {json.dumps(TEXTS)}
block_tokens = 64
[round]
tokens_per_node = 64
""")
    result = CliRunner().invoke(
        app,
        f"parity --config {toml} --nodes 2 --rounds 1 --seed 5 --heldout-tokens 256 --json "
        f"--out {tmp_path / 'net'}",
    )
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "net" / "parity.json").read_text())
    assert data["from_scratch"] is False
    assert (tmp_path / "net" / "index.html").is_file()
    assert torch.get_num_threads() == 1
