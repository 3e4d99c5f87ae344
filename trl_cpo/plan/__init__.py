"""What a run holds in memory, from the model's config alone: `estimate` says what is resident, `changes` what makes it fit."""

from .changes import Change, cheapest
from .memory import Estimate, PlanRequest, estimate

__all__ = ["Change", "Estimate", "PlanRequest", "cheapest", "estimate"]
