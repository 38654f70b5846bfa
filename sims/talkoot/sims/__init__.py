"""The researcher: local networks of real processes, simulations of large ones, their reports.

For notebooks: ``from talkoot.sims import Scenario, plan, run``. Nothing heavy is imported before it
is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talkoot.sims.planning import plan
    from talkoot.sims.scenario import Scenario
    from talkoot.sims.virtual.command import run

__all__ = ["Scenario", "plan", "run"]
_HOMES = {
    "Scenario": "talkoot.sims.scenario",
    "plan": "talkoot.sims.planning",
    "run": "talkoot.sims.virtual.command",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
