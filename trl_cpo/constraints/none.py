"""No constraint: DPO."""

from dataclasses import dataclass

from .base import Constraint


@dataclass(frozen=True)
class NoConstraint(Constraint):
    """DPO: the target margin is the reference's own gap, `t = δ_ref` (arXiv 2305.18290, Eq. 7)."""
