"""The round loop on the virtual clock."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from talkoot.server.conductor import Conductor
from talkoot.server.evaluator import Evaluator
from talkoot.sims.virtual.control import Over, VirtualControl
from talkoot.sims.virtual.site import Site


class VirtualConductor(Conductor):
    """The round loop, which takes virtual time to publish, and ends with the scenario.

    A version is measured while the next round trains, as the operator's evaluator does it; in the
    ledger that is done at the moment at which the version was published.
    """

    def __init__(self, site: Site, control: VirtualControl) -> None:
        super().__init__(
            site.coordinator,
            site.registry,
            control,
            clock=control.world.clock,
            sleep=control.advance,
        )
        self._virtual = control
        self._published_at = control.world.now
        self._evaluator = Evaluator(site.coordinator, clock=lambda: self._published_at)
        self._beside = ThreadPoolExecutor(1)
        self._measured: Future[bool] | None = None

    def run(self) -> None:
        """Run rounds until the scenario is over."""
        with self._beside:
            self._measure()
            try:
                super().run()
            except Over:
                pass
            self._wait_until_measured()

    def _finish(self, number: int) -> None:
        contributions = len(self._book.contributions(number))
        self._wait_until_measured()
        world = self._virtual.world
        self._virtual.until(world.now + self._virtual.timing.publishing(contributions))
        super()._finish(number)
        self._published_at = world.now
        self._measure()
        self._virtual.published(number)

    def _measure(self) -> None:
        if self._c.config.evaluation.every:
            self._measured = self._beside.submit(self._evaluator.step)

    def _wait_until_measured(self) -> None:
        """Raises what went wrong over it."""
        if self._measured is not None:
            self._measured.result()
            self._measured = None
