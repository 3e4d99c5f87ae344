"""A run's memory, from the model's config alone: `memory` estimates it, `changes` finds what makes it fit."""

from .changes import Change, cheapest, quicker
from .memory import Estimate, PlanRequest, estimate

__all__ = ["Change", "Estimate", "PlanRequest", "cheapest", "estimate", "quicker"]
