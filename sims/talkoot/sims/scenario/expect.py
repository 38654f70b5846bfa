"""Figures that a scenario may expect something of, and whether they hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from talkoot.sims.scenario.model import Expected

METRICS: Final[Mapping[str, str]] = {
    "rounds": "published rounds",
    "virtual_days": "days that they took, on the virtual clock",
    "round_seconds": "mean seconds of a round",
    "reopened": "times a round had to be leased anew",
    "tokens": "tokens of accepted contributions",
    "tokens_per_day": "tokens a virtual day",
    "utilization": "share of their time online in which admitted nodes train",
    "nodes": "nodes that were ever there",
    "nodes_that_fit": "of them, those whose memory and disk hold a replica",
    "contributions_per_round": "mean accepted contributions of a round",
    "bytes_up": "bytes that nodes pushed",
    "bytes_down": "bytes that nodes fetched",
    "coordinator_egress_gb_per_day": "GB a day out of the coordinator",
    "coordinator_ingress_gb_per_day": "GB a day into the coordinator",
    "kwh": "kWh, energy of all nodes",
    "cost": "energy and egress, in the scenario's currency",
    "days_to_target": "days to target_tokens at this pace",
    "loss": "held-out loss of the last version (run)",
    "first_loss": "held-out loss of the first version (run)",
    "attackers_quarantined": "attackers that were shut out (run)",
    "honest_quarantined": "honest nodes that were shut out (run)",
}
"""By name; ``run`` marks what only real training tells."""


def broken(expect: Mapping[str, Expected], figures: Mapping[str, float | None]) -> list[str]:
    """A sentence for each expectation that does not hold.

    Figures that this engine does not have (they are not in ``figures``) are passed over; one that
    has no value (None) holds no bound.
    """
    found = []
    for name, bound in expect.items():
        if name not in figures:
            continue
        value = figures[name]
        if value is None:
            found.append(f"{name} has no value ({METRICS[name]}).")
        elif bound.min is not None and not value >= bound.min:
            found.append(f"{name} is {value:,.6g} and was expected to be {bound.min:,.6g} or more.")
        elif bound.max is not None and not value <= bound.max:
            found.append(f"{name} is {value:,.6g} and was expected to be {bound.max:,.6g} or less.")
    return found
