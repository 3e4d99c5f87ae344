"""A penalty on the violated part of the gap."""

import torch
from torch import Tensor

from ..pairs import PairLogps
from .base import Constraint, Knobs


class Penalty(Constraint):
    """DPO plus a hinge on the policy's own gap: `ℓ_DPO + λ · max(0, γ − δ_θ)`, λ = `penalty_weight`.

    The bounded version of the objective `E[r] − β KL + γ E[δ_π]` of arXiv 2605.20834, Eq. 10. It pushes a pair with
    the full force λ per nat until δ_θ reaches γ, and not at all afterwards. λ = 0 is DPO.
    """

    reads = ("gamma", "penalty_weight")

    def added_loss(self, pairs: PairLogps, knobs: Knobs) -> Tensor:
        return knobs.penalty_weight * torch.relu(knobs.gamma - pairs.gap)

    def cautions(self, knobs: Knobs) -> list[str]:
        if knobs.penalty_weight == 0.0:
            return ["penalty_weight=0 makes constraint='penalty' plain DPO: set penalty_weight > 0."]
        return []
