"""The ServerApp that Flower runs: the round loop, in the process that Flower starts for it.

The SuperLink's bundle names ``talkoot.server.app:app`` and carries no code. What the app stands on
(state, clock, the way to the nodes) it gets from its surroundings: the operator's
(:func:`operators`), or what a simulation put in their place (:func:`set_surroundings`) before it
gave the same object to Flower's simulation engine.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.files import DirectoryLock

if TYPE_CHECKING:
    from talkoot.server.conductor import Conductor

STATE_VARIABLE = "TALKOOT_STATE"
"""Where the operator's state is: by environment, since a run's configuration goes to every node."""

Surroundings = Callable[[Grid], AbstractContextManager["Conductor"]]
"""A round loop over Flower's grid, with all that it stands on open."""

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]  # flwr is not typed for us
def main(grid: Grid, _context: Context) -> None:
    """Run rounds until the run is finished."""
    with (_surroundings or operators)(grid) as conductor:
        try:
            conductor.run()
        except Exception:
            logging.getLogger(__name__).exception("the round loop failed")
            raise


@contextlib.contextmanager
def operators(grid: Grid) -> Iterator[Conductor]:
    """The operator's state directory, the machine's clock, and Flower's grid as it is."""
    from talkoot.server.conductor import Conductor
    from talkoot.server.coordinator import Coordinator
    from talkoot.server.flower import ControlApi, WaryGridControl
    from talkoot.server.logs import configure
    from talkoot.server.registry import Registry

    state = os.environ.get(STATE_VARIABLE)
    if not state:
        raise ConfigError(
            f"{STATE_VARIABLE} is not set: start the coordinator with 'talkoot-coordinator serve'."
        )
    coordinator = Coordinator.open(Path(state))
    configure(coordinator.state.logs / "rounds.log")
    with contextlib.suppress(OSError):  # Flower notices a death, too, a minute later
        coordinator.state.round_loop_pid.write_text(str(os.getpid()), encoding="ascii")
    control = ControlApi(coordinator.config.network.superlink_port, coordinator.loopback_ca_pem)
    # One that outlived its SuperLink may still be writing a version: two must never do so.
    lock = DirectoryLock(coordinator.state.run, who="round loop")
    lock.wait()
    warm = threading.Thread(target=importlib.import_module, args=("talkoot.server.aggregate",))
    warm.start()  # the first round is at work meanwhile
    try:
        yield Conductor(coordinator, Registry(coordinator, control), WaryGridControl(grid))
    finally:
        lock.release()
        coordinator.close()


_surroundings: Surroundings | None = None


def set_surroundings(surroundings: Surroundings | None) -> None:
    """Let a simulation in this process say what the app stands on; None: the operator's again."""
    global _surroundings
    _surroundings = surroundings
