"""The ServerApp that Flower runs: the round loop, in the process that Flower starts for it.

The SuperLink's bundle names ``talkoot.server.app:app`` and carries no code. Where the operator's
state is comes by environment (:data:`STATE_VARIABLE`), since a run's configuration is sent to every
node.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.files import DirectoryLock

STATE_VARIABLE = "TALKOOT_STATE"

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]  # flwr is not typed for us
def main(grid: Grid, _context: Context) -> None:
    """Run rounds until the run is finished."""
    from talkoot.server.conductor import Conductor
    from talkoot.server.coordinator import Coordinator
    from talkoot.server.flower import ControlApi, GridControl
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
        Conductor(coordinator, Registry(coordinator, control), GridControl(grid)).run()
    except Exception:
        logging.getLogger(__name__).exception("the round loop failed")
        raise
    finally:
        lock.release()
        coordinator.close()
