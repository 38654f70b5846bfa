"""One scenario file for both engines: ``run`` (real training) and ``plan`` (no training)."""

from talkoot.sims.scenario.expect import METRICS, broken
from talkoot.sims.scenario.load import find, library, load_scenario, parse_scenario, schema
from talkoot.sims.scenario.model import NodeClass, Population, Scenario

__all__ = [
    "METRICS",
    "NodeClass",
    "Population",
    "Scenario",
    "broken",
    "find",
    "library",
    "load_scenario",
    "parse_scenario",
    "schema",
]
