"""How a network would fare, without training: discrete events over the real rules (ADR 17)."""

from talkoot.sims.planning.engine import Engine, plan
from talkoot.sims.planning.result import PHASES, PlanResult
from talkoot.sims.planning.sizes import Sizes

__all__ = ["PHASES", "Engine", "PlanResult", "Sizes", "plan"]
