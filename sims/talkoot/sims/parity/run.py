"""Run the curves that are missing, one after the other, and keep each: nothing is done twice.

A curve's directory is locked while it is worked at: two processes with different seeds may share
one output, and each then finds the other's curves finished.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.files import DirectoryLock, write_atomic
from talkoot.server.config import override_config
from talkoot.sims.lab.baseline import Baseline
from talkoot.sims.lab.behaviour import NodeProfile
from talkoot.sims.lab.network import Lab
from talkoot.sims.lab.world import World, make_corpus, make_world
from talkoot.sims.parity.options import Arm, Kind, ParityOptions
from talkoot.sims.parity.result import Curve, Measured, Point

Say = Callable[[str], None]

BASELINE_SAVE_ROUNDS = 10
"""A baseline's weights are written so often; a network's are after each round."""
KINDS: tuple[Kind, ...] = ("one", "ddp", "net")


def run_parity(options: ParityOptions, say: Say) -> list[Measured]:
    """All curves, by arm and seed; what is finished is read, the rest is run.

    Raises:
        TalkootError: an arm diverged, a corpus cannot be built, the disk is full …
    """
    # The same bits everywhere: with more threads, sums are split by the number of cores.
    torch.set_num_threads(1)
    return [
        Measured(arm, seed, {kind: _curve(options, kind, arm, seed, say) for kind in KINDS})
        for seed in options.seeds
        for arm in options.arms
    ]


def _curve(options: ParityOptions, kind: Kind, arm: Arm, seed: int, say: Say) -> Curve:
    directory = options.out / "curves" / options.key(kind, arm, seed)
    directory.mkdir(parents=True, exist_ok=True)
    finished = directory / "curve.json"
    lock = DirectoryLock(directory, who="parity")
    lock.wait()
    try:
        if not finished.is_file():
            work = (options.work or options.out / "work") / directory.name
            name = f"{arm.name if kind == 'net' else kind}, seed {seed}"
            curve = _Work(options, kind, arm, seed, work, name, say).run()
            text = json.dumps(curve.to_json(), indent=1)
            write_atomic(finished, (text + "\n").encode())
            shutil.rmtree(work, ignore_errors=True)
        return Curve.from_json(json.loads(finished.read_text()))
    finally:
        lock.release()


def make_worlds(options: ParityOptions, arm: Arm, seed: int) -> tuple[World, World]:
    """The world of the measures and the arm's own: another one when version 0 is warmed up, or when
    nodes have their own text."""
    config = arm.config(options.base, seed)
    cache = options.out / "corpora"
    mixed = make_corpus(config, cache)
    tokens = options.heldout_tokens
    cold = override_config(config, {"warm_up.tokens": 0})
    world = make_world(cold, [mixed], heldout_tokens=tokens)
    if not arm.nodes.own_text:
        warm = config.warm_up.tokens > 0
        return world, make_world(config, [mixed], heldout_tokens=tokens) if warm else world
    sources = config.corpus.sources
    if len(sources) < 2:
        raise ConfigError("nodes.own_text needs a corpus of at least two sources.")
    shards = [make_corpus(config, cache, [source]) for source in sources]
    return world, make_world(config, shards, heldout_tokens=tokens, heldout_from=mixed)


def profiles(options: ParityOptions, arm: Arm) -> tuple[NodeProfile, ...]:
    """The nodes of an arm."""
    nodes = arm.nodes
    shards = len(options.base.corpus.sources) if nodes.own_text else 1
    return tuple(
        NodeProfile(
            speed=nodes.speeds[i % len(nodes.speeds)],
            dropout=nodes.dropout,
            recipe=nodes.recipes[i % len(nodes.recipes)],
            shard=i % shards,
        )
        for i in range(options.nodes)
    )


class _Work:
    """One curve in the making."""

    def __init__(
        self,
        options: ParityOptions,
        kind: Kind,
        arm: Arm,
        seed: int,
        work: Path,
        name: str,
        say: Say,
    ) -> None:
        self._options = options
        self._kind = kind
        self._name = name
        self._say = say
        measure, own = make_worlds(options, arm, seed)
        self._parameters = own.manifest.parameters
        self._before = own.before if kind == "net" else ()
        self._start = own.spec().inner.start_tokens if kind == "net" else 0
        """Tokens of the schedule that passed before the network's first round."""
        self._runner: Lab | Baseline
        if kind == "net":
            self._runner = Lab(own, profiles(options, arm), work)
        else:
            self._runner = Baseline(measure, options.nodes, kind, work)
        self._notes = work / "notes.jsonl"
        self._rounds: dict[int, dict[str, Any]] = {}
        self._points: dict[int, Point] = {}
        if self._notes.is_file():
            self._read()

    def run(self) -> Curve:
        """To the last horizon."""
        options, runner = self._options, self._runner
        for horizon in options.horizons:
            due = horizon * options.round_tokens - self._start
            while runner.tokens < due:
                self._round()
            if horizon not in self._points:
                early = due < 0 and horizon <= len(self._before)  # while version 0 was trained
                loss = self._before[horizon - 1] if early else runner.heldout_loss()
                point = Point(horizon, self._start + (due if early else runner.tokens), loss)
                self._points[horizon] = point
                self._note({"point": point.to_json()})
                self._say(
                    f"{self._name}: round {runner.round}, {point.tokens:,} tokens, held-out loss "
                    f"{point.loss:.4f}"
                )
        rounds = [self._rounds[number] for number in sorted(self._rounds)]
        return Curve(
            kind=self._kind,
            parameters=self._parameters,
            points=tuple(self._points[h] for h in options.horizons),
            bits_up=tuple(r["up"] for r in rounds),
            bits_down=tuple(r["down"] for r in rounds),
            steps=max((r["steps"] for r in rounds), default=0),
            seconds=sum(r["seconds"] for r in rounds),
            training_seconds=sum(r["training_seconds"] for r in rounds),
        )

    def _round(self) -> None:
        runner = self._runner
        began = time.perf_counter()
        if isinstance(runner, Lab):
            done = runner.run_round()
            note = {
                "up": done.bits_up,
                "down": done.bits_down,
                "steps": max(s.steps for s in done.accepted),
                "training_seconds": done.seconds["steps"],
            }
        else:
            runner.run_round()
            note = {"up": 0.0, "down": 0.0, "steps": 0, "training_seconds": 0.0}
            if runner.round % BASELINE_SAVE_ROUNDS == 0:
                runner.save()
        note |= {"round": runner.round, "seconds": time.perf_counter() - began}
        self._rounds[runner.round] = note
        self._note(note)

    def _note(self, note: dict[str, Any]) -> None:
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")

    def _read(self) -> None:
        """What is on record up to where the files are; what came after that is done again."""
        for line in self._notes.read_text(encoding="utf-8").splitlines():
            try:
                note = json.loads(line)
            except ValueError:
                continue  # killed while it was written
            if "point" in note:
                point = Point.from_json(note["point"])
                if point.tokens <= self._start + self._runner.tokens:
                    self._points[point.horizon] = point
            elif note["round"] <= self._runner.round:
                self._rounds[note["round"]] = note
