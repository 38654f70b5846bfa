"""The round loop on the virtual clock."""

from __future__ import annotations

from talkoot.server.conductor import Conductor
from talkoot.server.evaluator import Evaluator
from talkoot.sims.virtual.control import Over, VirtualControl
from talkoot.sims.virtual.site import Site


class VirtualConductor(Conductor):
    """The round loop, which takes virtual time to publish, and ends with the scenario."""

    def __init__(self, site: Site, control: VirtualControl, evaluator: Evaluator) -> None:
        super().__init__(
            site.coordinator,
            site.registry,
            control,
            clock=control.world.clock,
            sleep=control.advance,
        )
        self._virtual = control
        self._evaluator = evaluator

    def run(self) -> None:
        """Run rounds until the scenario is over."""
        try:
            super().run()
        except Over:
            pass

    def _finish(self, number: int) -> None:
        contributions = len(self._book.contributions(number))
        world = self._virtual.world
        self._virtual.until(world.now + self._virtual.timing.publishing(contributions))
        super()._finish(number)
        if self._c.config.evaluation.every:
            self._evaluator.step()
        self._virtual.published(number)
