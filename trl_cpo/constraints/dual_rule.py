"""How the multiplier of a constrained objective moves."""

import math
from dataclasses import dataclass

#: What can drive the multiplier, metrics of `trl_cpo.metrics`: the mean hinge max(0, γ − δ_θ), nats, or the fraction of
#: pairs with δ_θ < γ. What is differentiated is the form's added loss in both cases.
SIGNALS = ("violation", "violation_rate")


@dataclass(frozen=True)
class DualRule:
    """Dual ascent: `λ ← clip(λ + η (v − ε), 0, cap)`, v the mean of `signal` over all pairs of an optimizer step.

    ε (`epsilon`) and v are in nats for "violation" and fractions for "violation_rate"; λ, its start and its cap in 1/nats;
    η (`step_size`) in 1/nats per unit of v. No update is made in the first `warmup_steps` optimizer steps.
    """

    epsilon: float
    step_size: float
    cap: float
    start: float = 0.0
    warmup_steps: int = 0
    signal: str = "violation"

    def updated(self, multiplier: float, violation: float, share: float = 1.0) -> float:
        """λ after one step at a mean violation; a violation that is not finite leaves it as it is.

        `share` multiplies η: the pairs of this step over those of a mean step, so that every pair moves λ alike.
        """
        if self.step_size == 0.0 or not math.isfinite(violation):  # 0 · ∞ is no number
            return multiplier
        return min(max(multiplier + share * self.step_size * (violation - self.epsilon), 0.0), self.cap)
