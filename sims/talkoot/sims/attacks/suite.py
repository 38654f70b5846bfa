"""The arms of the attack suite, and what each measured.

An arm is one network from its first round to its last. What is done is kept in ``arms/``: the same
command again does only what is missing, and several at once share the work.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.files import write_atomic
from talkoot.server.config import parse_config
from talkoot.server.setup import Identity, init
from talkoot.sims.attacks.figures import HONEST, summarise
from talkoot.sims.attacks.kinds import KINDS, Actor, liars, odd_ones
from talkoot.sims.attacks.loris import SLOW_LORIS, WireStage
from talkoot.sims.attacks.stage import Stage, key_of

HONEST_NODES: Final = 6
LIARS: Final = 2
WAVE: Final = 8
"""Newcomers of the sybil wave, which come when the others are established."""
WAVE_ROUND: Final = 5
QUICK_KINDS: Final = ("sign flip", "copy", "NaN", SLOW_LORIS)
DRAWS: Final = 3
"""Honest runs a seed: the same nodes under other keys, and so with other leases. Their mean is what
attacks are held against, and their spread is chance: one draw alone puts its own luck into every
ratio (``docs/LOG.md``, 2026-11-26)."""


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
    draws: int = DRAWS


FULL: Final = Size(12, 4096, 96, 2, (*KINDS, SLOW_LORIS), undefended=True)
QUICK: Final = Size(5, 1024, 64, 1, QUICK_KINDS, undefended=False, draws=1)


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
    again = arm.removeprefix(HONEST) if arm.startswith(HONEST) else ""
    honest = [Actor(f"honest{number}{again}") for number in range(HONEST_NODES)]
    if arm == "odd but honest":
        return honest[:4] + odd_ones()
    if arm.startswith(HONEST) or arm == "sybil wave":
        return honest
    # The first round shows how long uploads take in peace.
    return honest + liars(arm, LIARS, 2 if arm == SLOW_LORIS else 1)


def run_arm(state: Path, root: Path, arm: str, size: Size, *, defended: bool) -> dict[str, Any]:
    """One network to its end; what was measured."""
    shutil.rmtree(root, ignore_errors=True)
    stage = (
        WireStage(state, root, actors_of(arm))
        if arm == SLOW_LORIS
        else Stage(state, root, actors_of(arm), defended=defended)
    )
    with stage:
        for number in range(1, size.rounds + 1):
            if arm == "sybil wave" and number == min(WAVE_ROUND, size.rounds - 1):
                for liar in liars(arm, WAVE, 1):
                    stage.add(liar)
            stage.run_round()
            if number % 3 == 0 or number == size.rounds:
                stage.measure()
        found = {} if not isinstance(stage, WireStage) else {"transfers": stage.figures()}
        return found | {
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
    arms = [(draw_of(number), True) for number in range(size.draws)] + [("odd but honest", True)]
    arms += [(kind, True) for kind in size.kinds]
    if size.undefended:
        # The codec refuses NaN whoever is behind it, and a slow-loris is not after the mean.
        arms += [(kind, False) for kind in size.kinds if kind not in ("NaN", SLOW_LORIS)]
    return arms


def draw_of(number: int) -> str:
    """The arm of one honest run of a seed."""
    return HONEST if number == 0 else f"{HONEST} {number + 1}"


def run_suite(
    out: Path, work: Path, size: Size, say: Callable[[str], None], *, seeds: Sequence[int] = (0,)
) -> dict[str, Any]:
    """All arms that are missing, seed by seed, then the figures."""
    done = out / "arms"
    done.mkdir(parents=True, exist_ok=True)
    # With defences in all seeds first: the plain mean is for comparison.
    todo = sorted(
        ((arm, defended, seed) for seed in seeds for arm, defended in arms_of(size)),
        key=lambda one: not one[1],
    )
    for arm, defended, seed in todo:
        name = f"{arm.replace(' ', '-')}-{'defended' if defended else 'plain'}-{seed}"
        path = done / f"{name}.json"
        claim = done / f"{name}.begun"
        if path.is_file():
            continue
        state = make_state(work / f"made-{seed}", size, seed)
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
    return summarise(out, size.rounds, size.kinds)
