"""A penalty on the violated part of the gap."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..hyperparameters import hyperparameter
from ..pairs import PairLogps
from .base import Constraint


@dataclass(frozen=True)
class Penalty(Constraint):
    """DPO plus a hinge on the policy's own gap: `ℓ_DPO + λ · max(0, γ − δ_θ)`, λ = `penalty_weight`.

    The bounded version of the objective `E[r] − β KL + γ E[δ_π]` of arXiv 2605.20834, Eq. 10. It pushes a pair with
    the full force λ per nat until δ_θ reaches γ, and not at all afterwards. λ = 0 is DPO.
    """

    penalty_weight: float = hyperparameter(1.0, "Weight of the violation, per nat.", at_least=0.0)

    def added_loss(self, pairs: PairLogps, multiplier: float | Tensor) -> Tensor:
        return self.penalty_weight * torch.relu(self.gamma - pairs.gap)

    def cautions(self) -> list[str]:
        said = "penalty_weight=0 makes constraint='penalty' plain DPO: set penalty_weight > 0."
        return [said] if self.penalty_weight == 0.0 else []
