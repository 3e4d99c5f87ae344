"""The constraint as a constraint: a bound on the mean violation, with a multiplier found by dual ascent."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hyperparameters import hyperparameter
from ..pairs import PairLogps
from .base import Constraint
from .dual_rule import SIGNALS, DualRule


@dataclass(frozen=True)
class Lagrangian(Constraint):
    """DPO subject to `E[max(0, γ − δ_θ)] ≤ ε`: minimise `ℓ_DPO + λ · max(0, γ − δ_θ)` while λ ascends on the violation.

    λ is one number for all pairs; the trainer holds it (`trl_cpo.multiplier`) and updates it once per optimizer step. λ = 0
    is DPO. Source: method of multipliers on arXiv 2605.20834, Eq. 10, with the bounded violation.
    """

    epsilon: float = hyperparameter(
        0.0, "The mean violation allowed, in nats or as a fraction (dual_signal).", at_least=0.0, infinite=True
    )
    dual_lr: float | None = hyperparameter(
        None,
        "Step size of the multiplier per optimizer step, per nat and unit of the signal. Default: 0.1 beta^2 for the signal "
        "'violation', 0.1 beta for 'violation_rate'.",
        at_least=0.0,
    )
    dual_max: float | None = hyperparameter(None, "Cap of the multiplier, per nat. Default: beta.", above=0.0)
    dual_init: float = hyperparameter(0.0, "The multiplier at the start, per nat.", at_least=0.0)
    dual_warmup_steps: int = hyperparameter(0, "Optimizer steps at the start that leave the multiplier as it is.", at_least=0)
    dual_signal: str = hyperparameter(
        "violation",
        "What drives the multiplier: the mean hinge 'violation' (nats) or the fraction 'violation_rate'.",
        choices=SIGNALS,
    )

    @property
    def dual_rule(self) -> DualRule:
        scale = self.beta**2 if self.dual_signal == "violation" else self.beta
        step_size = 0.1 * scale if self.dual_lr is None else self.dual_lr
        cap = self.beta if self.dual_max is None else self.dual_max
        return DualRule(self.epsilon, step_size, cap, self.dual_init, self.dual_warmup_steps, self.dual_signal)

    def added_loss(self, pairs: PairLogps, multiplier: float | Tensor) -> Tensor | None:
        # None and not zeros: with λ = 0 the step is DPOTrainer's to the last bit, also where the hinge overflows.
        if isinstance(multiplier, float) and multiplier == 0.0:
            return None
        return multiplier * torch.relu(self.gamma - pairs.gap)

    def faults(self) -> list[str]:
        if self.beta > 1e100:  # its square, of which the step size is made, may be beyond any float
            return [f"beta must be at most 1e100 under constraint='lagrangian'; got {self.beta!r}."]
        cap, faults = self.dual_rule.cap, []
        if self.dual_init > cap:
            faults.append(f"dual_init must be at most dual_max={cap:g}; got {self.dual_init!r}.")
        if self.dual_signal == "violation_rate" and 1.0 <= self.epsilon < math.inf:
            faults.append(
                f"epsilon is a fraction of pairs under dual_signal='violation_rate', and {self.epsilon!r} allows them all. Set "
                "it below 1, or use dual_signal='violation' for an epsilon in nats."
            )
        return faults

    def cautions(self) -> list[str]:
        if self.epsilon == 0.0:
            return [
                "constraint='lagrangian' with epsilon=0 allows no violation at all, so its multiplier never falls and ends "
                "at its cap wherever one pair stays below gamma: set epsilon to the mean violation that you can accept."
            ]
        if self.epsilon == math.inf and self.dual_init == 0.0:
            return ["constraint='lagrangian' with epsilon=inf and dual_init=0 is plain DPO: set a finite epsilon."]
        return []
