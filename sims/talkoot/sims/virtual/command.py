"""``run``: the Python function and what the command stands on.

The engine is a child process in a session of its own. When it has ended in any way, what is left of
its session is ended here; when this process dies, the engine does that itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from talkoot.protocol.errors import ConfigError, StateError, TalkootError, UnavailableError
from talkoot.protocol.files import DirectoryLock, write_atomic
from talkoot.sims.scenario import Scenario, broken
from talkoot.sims.tables import require_parquet
from talkoot.sims.virtual import session
from talkoot.sims.virtual.estimate import require_room
from talkoot.sims.virtual.layout import Layout

MAX_NODES: Final = 5000
"""Nodes that one run bears: each has a replica on disk."""
RAY_PREFIX: Final = "tkray-"
TAIL_CHARS: Final = 300


@dataclass(frozen=True)
class RunResult:
    """What a run found."""

    figures: dict[str, float | None]
    """By the names of ``talkoot.sims.scenario.METRICS``; None has no value."""
    rounds: list[dict[str, Any]]
    """One published round each; see ``result.RoundFound``."""
    nodes: list[dict[str, Any]]
    """One node each; see ``result.NodeFound``."""
    weights_digest: str
    """Of the last version: the same scenario and seed give the same, on the same machine."""
    broken: list[str]
    """A sentence for each expectation of the scenario that does not hold."""
    out: Path
    """``report.html``, ``run.json`` and the tables."""
    document: dict[str, Any]
    """All of ``run.json``."""

    @property
    def holds(self) -> bool:
        """Whether all that the scenario expects holds."""
        return not self.broken

    @property
    def leases(self) -> Path:
        """A table of every lease: when it was sent, fetched, trained, arrived, and the answer."""
        return self.out / "leases.csv"


Progress = Callable[[dict[str, Any]], None]


def no_progress(_document: dict[str, Any]) -> None:
    """The ``progress`` of whoever does not listen."""


def run(
    scenario: Scenario,
    *,
    out: Path | str | None = None,
    work: Path | str | None = None,
    workers: int | None = None,
    address: str | None = None,
    progress: Progress = no_progress,
    parquet: bool = False,
) -> RunResult:
    """Simulate a scenario with real training. What was begun in ``out`` goes on where it was.

    Args:
        scenario: from ``load_scenario``.
        out: where report, figures and tables go; ``runs/NAME-sSEED`` if not given.
        work: the nodes' files; in ``out`` if not given. ``/dev/shm/…`` saves the disk's time.
        workers: processes that train; one for each CPU if not given.
        address: of a Ray cluster whose machines all see ``work``.
        progress: hears how far it is.
        parquet: write the tables as Parquet, too (``talkoot[parquet]``).

    Raises:
        ConfigError: an extra is not installed, or the scenario is too large for real training.
        UnavailableError: the engine failed; the same call goes on where it was.
    """
    require_extra()
    if parquet:
        require_parquet()
    if scenario.nodes > MAX_NODES:
        raise ConfigError(
            f"{scenario.nodes} nodes are more than real training bears here ({MAX_NODES}): use "
            "talkoot-sim plan, or lower the counts."
        )
    target = Path(out or f"runs/{scenario.name}-s{scenario.seed}").absolute()
    files = Path(work).absolute() if work is not None else target / "work"
    count = workers if workers is not None else os.cpu_count() or 1
    target.mkdir(parents=True, exist_ok=True)
    files.mkdir(parents=True, exist_ok=True)
    _same_scenario(files, scenario)
    found = files / "found.json"  # there once the engine has come to the end
    with DirectoryLock(files, who="simulation"):
        if not found.exists():
            require_room(scenario)
            _drive(scenario, files, found, count, address, progress)
        return _report(scenario, target, Layout(files), found, parquet)


def require_extra() -> None:
    """Raise :class:`ConfigError` when Flower's simulation engine is not installed."""
    missing = [name for name in ("ray", "simpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Simulations need {' and '.join(missing)}: install with "
            "`pip install 'talkoot[sims]'`.",
            code="missing-extra",
        )


def _same_scenario(files: Path, scenario: Scenario) -> None:
    """A directory is one scenario's; only what it expects may change."""
    kept = files / "scenario.json"
    mine = scenario.model_dump(mode="json", exclude={"expect", "sentence"})
    try:
        held = json.loads(kept.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_atomic(kept, json.dumps(mine).encode())
        return
    if held != json.loads(json.dumps(mine)):
        raise StateError(
            f"{files} holds a run of another scenario, or of this one before it was changed: "
            "choose another --out, or delete it.",
            code="other-scenario",
        )


def _report(
    scenario: Scenario, out: Path, layout: Layout, result: Path, parquet: bool
) -> RunResult:
    from talkoot.sims.virtual.report import write_report
    from talkoot.sims.virtual.result import read_leases, write_tables

    document = json.loads(result.read_text(encoding="utf-8"))
    document["scenario"] = scenario.model_dump(mode="json")
    failures = broken(scenario.expect, document["figures"])
    document["broken"] = failures
    # Rows of tables, which would only make the JSON hard to read.
    present = document.pop("presence", [])
    leases = read_leases(layout.events, document.pop("beliefs", {}))
    write_atomic(out / "run.json", json.dumps(document, indent=1).encode())
    write_tables(document, leases, present, out, parquet=parquet)
    write_report(document, leases, present, out)
    return RunResult(
        figures=document["figures"],
        rounds=document["rounds"],
        nodes=document["nodes"],
        weights_digest=document["weights_digest"],
        broken=failures,
        out=out,
        document=document,
    )


# The child ----------------------------------------------------------------------------------------


def _drive(
    scenario: Scenario,
    files: Path,
    result: Path,
    workers: int,
    address: str | None,
    progress: Progress,
) -> None:
    """Run the engine to its end, and leave no process of it behind."""
    ray_files = Path(tempfile.mkdtemp(prefix=RAY_PREFIX))
    job = files / "job.json"
    document = {
        "scenario": scenario.model_dump(mode="json"),
        "work": str(files),
        "result": str(result),
        "workers": workers,
        "address": address,
        "ray_files": str(ray_files),
    }
    write_atomic(job, json.dumps(document).encode())
    command = [sys.executable, "-m", "talkoot.sims.virtual.engine", str(job)]
    try:
        with (files / "engine.log").open("ab") as log:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True
            )
            assert child.stdout is not None
            try:
                failure = _listen(child, progress)
            finally:
                session.end(child.pid)
                child.wait()
                child.stdout.close()
    finally:
        shutil.rmtree(ray_files, ignore_errors=True)
    if failure is not None:
        raise failure
    if child.returncode != 0:
        raise UnavailableError(
            f"The engine ended with {_how(child.returncode)}: see {files / 'engine.log'}, and run "
            "it again; it goes on where it was.",
            code="engine-died",
        )


def _listen(child: subprocess.Popen[str], progress: Progress) -> TalkootError | None:
    """Follow the engine's progress until it has no more; what it failed with."""
    failure: TalkootError | None = None
    assert child.stdout is not None
    for line in child.stdout:
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if document.get("what") == "failed":
            failure = TalkootError(str(document["sentence"]), code=str(document["code"]))
        elif document.get("what") != "done":
            progress(document)
    child.wait()
    return failure


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
