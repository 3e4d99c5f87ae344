"""The method's theory in float64: closed forms and a solver for audits, certificates and tests. No trainer calls it."""

from .bounds import most_below
from .lagrangian import population_lagrangian, population_penalty
from .population import alignment_threshold, population_gap, population_gaps, population_loss
from .region import assumption_holds, escape_time, in_undesirable_region, pull, soft_margin_excess
from .rlhf import constrained_optimum, rlhf_objective, rlhf_optimum

__all__ = [
    "alignment_threshold",
    "assumption_holds",
    "constrained_optimum",
    "escape_time",
    "in_undesirable_region",
    "most_below",
    "population_gap",
    "population_gaps",
    "population_lagrangian",
    "population_loss",
    "population_penalty",
    "pull",
    "rlhf_objective",
    "rlhf_optimum",
    "soft_margin_excess",
]
