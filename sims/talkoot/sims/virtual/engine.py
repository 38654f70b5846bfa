"""The process of Flower's simulation engine: ``python -m talkoot.sims.virtual.engine FILE``.

It is a process of its own, so that what Flower, Ray and their threads print, change and leave
behind is not its user's, and so that it can be ended with all that it started. ``FILE`` is a
:class:`Job`; progress goes to standard output, a JSON object a line, all else to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from talkoot.protocol.errors import TalkootError, UnavailableError
from talkoot.sims.scenario import Scenario
from talkoot.sims.virtual.session import end_with_parent

OBJECT_STORE_BYTES: Final = 100 * 2**20
"""Of Ray's shared memory: messages are small, and weights do not go this way."""
ENGINE_VARIABLES: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_enable_metrics_collection": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Nothing phones home, and sums have one order: bits must not depend on the number of workers."""


class Job(BaseModel):
    """What the engine is to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenario: Scenario
    work: Path
    result: Path
    """Where the figures go at the end."""
    workers: int
    address: str | None = None
    """Of a Ray cluster, all of whose machines see ``work``; None starts Ray here."""
    ray_files: Path
    """Ray's own temporary files: a short path, since sockets are in it."""


class Engine:
    """One run. Flower's engine keeps the main thread, the ServerApp has another."""

    def __init__(self, job: Job, out: Any) -> None:
        self._job = job
        self._out = out
        self._stopped: str | None = None

    def say(self, document: dict[str, Any]) -> None:
        """Tell how far it is."""
        self._out.write(json.dumps(document) + "\n")
        self._out.flush()

    def run(self) -> None:
        """To the scenario's end. Raises :class:`TalkootError`."""
        import torch

        from talkoot.server.app import app, set_surroundings
        from talkoot.sims.virtual import flower
        from talkoot.sims.virtual.layout import Layout

        torch.set_num_threads(1)
        self._began = time.monotonic()
        self._layout = Layout(self._job.work)
        self._prepare()
        set_surroundings(self._surroundings)
        flower.simulate(
            app,
            str(self._job.work),
            self._fleet.count,
            workers=self._job.workers,
            address=self._job.address,
            ray_files=self._job.ray_files,
            object_store_bytes=OBJECT_STORE_BYTES,
            ended=self._end,
        )

    def _end(self, why: str) -> None:
        self._stopped = why

    def _prepare(self) -> None:
        """The operator's state and the nodes, made or found."""
        from talkoot.server.state import StateDir
        from talkoot.sims.planning.engine import horizon_of
        from talkoot.sims.planning.fit import fits_of
        from talkoot.sims.planning.fleet import Fleet
        from talkoot.sims.planning.sizes import model_config, sizes_of
        from talkoot.sims.virtual.population import profiles
        from talkoot.sims.virtual.site import make_state
        from talkoot.sims.virtual.timing import Timing

        scenario, layout = self._job.scenario, self._layout
        layout.create()
        if not StateDir(layout.state).marker.exists():
            shutil.rmtree(layout.state, ignore_errors=True)  # an earlier start died over it
            self.say({"what": "preparing"})
            make_state(layout, scenario, logging.getLogger(__name__).info)
        config = model_config(scenario)
        sizes = sizes_of(scenario, config)
        horizon = horizon_of(scenario)
        self._horizon = horizon
        self._fleet = Fleet(scenario, fits_of(scenario, config, sizes.parameters), horizon)
        self._timing = Timing(scenario, self._fleet, sizes)
        self._profiles = profiles(scenario, self._fleet)

    @contextmanager
    def _surroundings(self, grid: Any) -> Iterator[Any]:
        """What the ServerApp stands on here (``server/app.py``)."""
        from talkoot.server.flower import GridControl
        from talkoot.sims.virtual.conductor import VirtualConductor
        from talkoot.sims.virtual.control import VirtualControl
        from talkoot.sims.virtual.result import write_result
        from talkoot.sims.virtual.site import EPOCH, Site
        from talkoot.sims.virtual.work import Work
        from talkoot.sims.virtual.world import World

        scenario, layout = self._job.scenario, self._layout
        world = World(scenario, self._fleet, layout.world)
        saved = world.load()
        self.say({"what": "starting"})
        ids = self._wait_for_nodes(grid)
        site = Site(layout, scenario, world.clock, ids)
        work = Work(GridControl(grid), self._job.workers, lambda: self._stopped)
        control = VirtualControl(
            world,
            site,
            self._timing,
            self._profiles,
            layout,
            work,
            self.say,
            EPOCH + self._horizon,
        )
        verdicts = self._let_in(world, site, control, resumed=saved is not None)
        if saved is not None:
            control.take_up(saved)
        try:
            yield VirtualConductor(site, control)
            control.close()
            write_result(
                self._job.result,
                scenario,
                world,
                site,
                self._profiles,
                verdicts,
                {
                    "seconds": time.monotonic() - self._began,
                    "working_seconds": work.seconds,
                    "workers": self._job.workers,
                    "round_seconds": control.real_seconds,
                    "step_seconds": layout.steps(),
                    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                },
            )
        finally:
            site.close()

    def _let_in(self, world: Any, site: Any, control: Any, *, resumed: bool) -> dict[int, str]:
        """The nodes of the beginning, or all that were in before; sentences of the refused."""
        if resumed:
            indices = sorted(world.nodes)
            fits, kinds = self._fleet.fits, self._fleet.kind
            site.enrol([(self._profiles[i], fits[int(kinds[i])]) for i in indices])
            return {}
        self.say({"what": "admitting", "total": self._fleet.count})
        later = set(self._fleet.waiting.tolist())
        first = [i for i in range(self._fleet.count) if i not in later]
        found = control.welcome(first, holding=0)
        world.expect_days()
        return {i: verdict.sentence for i, verdict in found.items() if not verdict.accepted}

    def _wait_for_nodes(self, grid: Any) -> list[int]:
        while True:
            ids = sorted(int(number) for number in grid.get_node_ids())
            if len(ids) == self._fleet.count:
                return ids
            if self._stopped is not None:
                raise UnavailableError(f"Flower's simulation engine stopped: {self._stopped}.")
            time.sleep(0.05)


def main() -> None:
    """Entry point."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what Flower and Ray print is not for whoever reads the progress
    os.environ.update(ENGINE_VARIABLES)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    job = Job.model_validate_json(Path(sys.argv[1]).read_bytes())
    end_with_parent(job.ray_files)
    engine = Engine(job, out)
    try:
        engine.run()
    except TalkootError as err:
        engine.say({"what": "failed", "sentence": err.sentence, "code": err.code})
        logging.getLogger(__name__).exception("the engine failed")
        os._exit(1)  # threads of Flower's may wait for what never comes
    engine.say({"what": "done"})
    os._exit(0)


if __name__ == "__main__":
    main()
