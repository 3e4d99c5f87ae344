"""The constraint as a constraint: a bound on the mean violation, with a multiplier found by dual ascent."""

from .base import Knobs
from .penalty import Penalty


class Lagrangian(Penalty):
    """DPO subject to `E[max(0, γ − δ_θ)] ≤ ε`: minimise `ℓ_DPO + λ · max(0, γ − δ_θ)` while λ ascends on the violation.

    λ is one number for all pairs, which the trainer holds (`trl_cpo.multiplier`), updates once per optimizer step, and hands
    over as `penalty_weight`: at each moment the added term is the penalty's. λ = 0 is DPO. Source: method of
    multipliers on arXiv 2605.20834, Eq. 10, with the bounded violation.
    """

    reads = ("gamma", "epsilon", "dual_lr", "dual_max", "dual_init", "dual_warmup_steps", "dual_signal")
    dual = True

    def added_loss(self, pairs, knobs: Knobs):
        # None and not zeros: with λ = 0 the step is DPOTrainer's to the last bit, also where the hinge overflows.
        return None if knobs.penalty_weight == 0.0 else super().added_loss(pairs, knobs)

    def cautions(self, knobs: Knobs) -> list[str]:
        if knobs.epsilon == 0.0:
            return [
                "constraint='lagrangian' with epsilon=0 allows no violation at all, so its multiplier never falls and ends "
                "at its cap wherever one pair stays below gamma: set epsilon to the mean violation that you can accept."
            ]
        if knobs.epsilon == float("inf") and knobs.dual_init == 0.0:
            return ["constraint='lagrangian' with epsilon=inf and dual_init=0 is plain DPO: set a finite epsilon."]
        return []
