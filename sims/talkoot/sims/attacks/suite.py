"""The arms of the attack suite, what each measured, and their table.

An arm is one network from its first round to its last. What is done is kept in ``arms/``: the same
command again does only what is missing, and several at once share the work.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.files import write_atomic
from talkoot.server.config import parse_config
from talkoot.server.setup import Identity, init
from talkoot.server.standing import false_quarantine
from talkoot.sims.attacks.kinds import KINDS, Actor, liars, odd_ones
from talkoot.sims.attacks.stage import Stage, key_of

HONEST_NODES: Final = 6
LIARS: Final = 2
WAVE: Final = 8
"""Newcomers of the sybil wave, which come when the others are established."""
WAVE_ROUND: Final = 5
BAR: Final = 0.03
"""Held-out loss may be so much above that of the run with honest nodes only."""
QUICK_KINDS: Final = ("sign flip", "copy", "NaN")


@dataclass(frozen=True)
class Size:
    """How large the arms are."""

    rounds: int
    tokens: int
    """Of a lease."""
    hidden: int
    layers: int
    kinds: Sequence[str]
    undefended: bool


FULL: Final = Size(12, 4096, 96, 2, KINDS, undefended=True)
QUICK: Final = Size(5, 1024, 64, 1, QUICK_KINDS, undefended=False)


def make_state(root: Path, size: Size, seed: int) -> Path:
    """An operator's state, made once for all arms."""
    state = root / "state"
    if (state / "state.json").is_file():
        return state
    from talkoot.protocol.model import preset

    shutil.rmtree(root, ignore_errors=True)
    text = root / "text"
    text.mkdir(parents=True)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(stdlib.glob("[a-s]*.py")):
        shutil.copy(file, text / file.name)
    model = preset("nano")
    model |= {
        "hidden_size": size.hidden,
        "intermediate_size": 8 * size.hidden // 3,
        "num_hidden_layers": size.layers,
    }
    (root / "model.json").write_text(json.dumps(model))
    # Of the honest alone: else the schedule of an arm whose liars were shut out would not end.
    total = size.rounds * HONEST_NODES * size.tokens
    config = parse_config(f"""
[run]
name = "attacks"
rounds = 1000000
seed = {seed}
[model]
config = "{root / "model.json"}"
sequence_length = 64
micro_batch = 8
[corpus]
sources = ["{text}"]
block_tokens = 512
heldout_fraction = 0.05
[inner]
learning_rate = 4e-3
warmup_tokens = {total // 20}
total_tokens = {total}
[round]
tokens_per_node = {size.tokens}
deadline_seconds = 600
checkpoint_every = 100
[network]
bind = "127.0.0.1"
""")
    identity = Identity(key_of(seed, "coordinator"), f"attacks-{seed}")  # leases follow from it
    init(state, config, say=lambda _line: None, identity=identity)
    return state


def actors_of(arm: str) -> list[Actor]:
    """The nodes that an arm begins with."""
    honest = [Actor(f"honest{number}") for number in range(HONEST_NODES)]
    if arm == "odd but honest":
        return honest[:4] + odd_ones()
    if arm in ("honest only", "sybil wave"):
        return honest
    return honest + liars(arm, LIARS, 1)


def run_arm(state: Path, root: Path, arm: str, size: Size, *, defended: bool) -> dict[str, Any]:
    """One network to its end; what was measured."""
    shutil.rmtree(root, ignore_errors=True)
    with Stage(state, root, actors_of(arm), defended=defended) as stage:
        for number in range(1, size.rounds + 1):
            if arm == "sybil wave" and number == min(WAVE_ROUND, size.rounds - 1):
                for liar in liars(arm, WAVE, 1):
                    stage.add(liar)
            stage.run_round()
            if number % 3 == 0 or number == size.rounds:
                stage.measure()
        return {
            "arm": arm,
            "defended": defended,
            "parameters": stage.coordinator.spec.parameters,
            "losses": stage.tale.losses,
            "final_loss": stage.tale.losses[-1][1],
            "verdicts": stage.tale.verdicts,
            "nodes": stage.standings(),
        }


def arms_of(size: Size) -> list[tuple[str, bool]]:
    """(arm, defended), the most telling first."""
    arms = [("honest only", True), ("odd but honest", True)]
    arms += [(kind, True) for kind in size.kinds]
    if size.undefended:
        # The codec refuses NaN whoever is behind it: there is no arm without that.
        arms += [(kind, False) for kind in size.kinds if kind != "NaN"]
    return arms


def run_suite(
    out: Path, work: Path, size: Size, say: Callable[[str], None], *, seeds: Sequence[int] = (0,)
) -> dict[str, Any]:
    """All arms that are missing, seed by seed, then the figures."""
    done = out / "arms"
    done.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        state = make_state(work / f"made-{seed}", size, seed)
        for arm, defended in arms_of(size):
            name = f"{arm.replace(' ', '-')}-{'defended' if defended else 'plain'}-{seed}"
            path = done / f"{name}.json"
            claim = done / f"{name}.begun"
            if path.is_file():
                continue
            try:
                claim.open("x").close()  # another process of this suite has it if this fails
            except FileExistsError:
                continue
            try:
                found = run_arm(state, work / name, arm, size, defended=defended) | {"seed": seed}
                write_atomic(path, json.dumps(found, indent=1).encode())
            finally:
                claim.unlink()
            said = "with defences" if defended else "plain mean"
            say(f"{arm}, {said}, seed {seed}: held-out loss {found['final_loss']:.3f}")
    return summarise(out, size)


def summarise(out: Path, size: Size) -> dict[str, Any]:
    """The figures of all arms that are done, also as ``attacks.json``.

    An arm is held against the honest run of its own seed, and these ratios are averaged: seeds
    differ more among themselves than arms of one seed do.
    """
    found = [json.loads(path.read_bytes()) for path in sorted((out / "arms").glob("*.json"))]
    by_arm = {(one["arm"], one["defended"], one["seed"]): one for one in found}
    honest = {s: one["final_loss"] for (a, _, s), one in by_arm.items() if a == "honest only"}
    rows = []
    for kind in size.kinds:
        arms = [by_arm[kind, True, s] for s in honest if (kind, True, s) in by_arm]
        if not arms:
            continue
        plain = [by_arm[kind, False, s] for s in honest if (kind, False, s) in by_arm]
        bad = [s for one in arms for s in one["nodes"].values() if not s["honest"]]
        liars_names = {n for one in arms for n, s in one["nodes"].items() if not s["honest"]}
        ratios = [one["final_loss"] / honest[one["seed"]] - 1 for one in arms]
        above = statistics.fmean(ratios)
        rows.append(
            {
                "attack": kind,
                "seeds": len(arms),
                "liars": len(bad),
                "honest_only": statistics.fmean(honest[one["seed"]] for one in arms),
                "defended": statistics.fmean(one["final_loss"] for one in arms),
                "plain_mean": (
                    statistics.fmean(one["final_loss"] for one in plain) if plain else None
                ),
                "above_honest_only": above,
                "above_by_seed": ratios,
                "within_bar": above <= BAR,
                "liars_quarantined": sum(s["standing"] == "quarantined" for s in bad),
                "honest_quarantined": sum(
                    s["standing"] == "quarantined" and s["honest"]
                    for one in arms
                    for s in one["nodes"].values()
                ),
                "verdicts": _sum(
                    [one["verdicts"].get(n, {}) for one in arms for n in sorted(liars_names)]
                ),
                "judged": _sum([s["judged"] for s in bad]),
            }
        )
    everybody = [
        s for one in found if one["defended"] for s in one["nodes"].values() if s["honest"]
    ]
    judged = sum(sum(s["judged"].values()) for s in everybody)
    aside = sum(s["judged"].get("set-aside", 0) for s in everybody)
    lost = sum(s["standing"] == "quarantined" for s in everybody)
    odd = [one for one in found if one["arm"] == "odd but honest" and one["defended"]]
    data = {
        "format": 2,
        "rounds": size.rounds,
        "parameters": found[0]["parameters"],
        "bar": BAR,
        "seeds": sorted(honest),
        "attacks": rows,
        "honest_nodes": {
            "nodes": len(everybody),
            "contributions": judged,
            "set_aside": aside,
            "quarantined": lost,
            "agreements": sorted(a for s in everybody for a in s["agreements"]),
            "false_quarantine_in_1000_rounds": false_quarantine(aside / max(judged, 1), 1000),
        },
        "odd": {f"{name} ({one['seed']})": s for one in odd for name, s in one["nodes"].items()},
    }
    write_atomic(out / "attacks.json", json.dumps(data, indent=1).encode())
    return data


def _sum(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, number in one.items():
            total[key] = total.get(key, 0) + number
    return total


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Final held-out losses as bars: with defences, and plain mean; the line is honest nodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = data["attacks"]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.6))
    places = range(len(rows))
    top = 2.5 * rows[0]["honest_only"]
    axes.barh([p + 0.2 for p in places], [r["defended"] for r in rows], 0.4, label="with defences")
    plain = [min(r["plain_mean"] or 0.0, top) for r in rows]
    axes.barh([p - 0.2 for p in places], plain, 0.4, label="plain mean", color="#c9735f")
    axes.axvline(rows[0]["honest_only"], color="black", lw=1, label="honest nodes only")
    axes.axvline((1 + data["bar"]) * rows[0]["honest_only"], color="black", lw=1, ls=":")
    axes.set_yticks(list(places), [r["attack"] for r in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, top)
    axes.set_xlabel("held-out loss after the last round, nats per token (cut at the right)")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(data: Mapping[str, Any]) -> str:
    """The table of the attacks, as Markdown."""
    lines = [
        "| attack | honest only | with defences | above it | plain mean | liars quarantined |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["attacks"]:
        plain = "—" if row["plain_mean"] is None else f"{row['plain_mean']:.3f}"
        spread = max(row["above_by_seed"]) - min(row["above_by_seed"])
        mark = "" if row["seeds"] == 1 else f" (spread {spread:.1%})"
        mark += "" if row["within_bar"] else ", over the bar"
        lines.append(
            f"| {row['attack']} | {row['honest_only']:.3f} | {row['defended']:.3f} | "
            f"{row['above_honest_only']:+.1%}{mark} | {plain} | "
            f"{row['liars_quarantined']} of {row['liars']} |"
        )
    return "\n".join(lines)
