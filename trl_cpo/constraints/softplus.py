"""The target margin raised by a softplus: the smooth, adaptive margin."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..hyperparameters import hyperparameter
from ..pairs import PairLogps
from .base import Constraint


@dataclass(frozen=True)
class Softplus(Constraint):
    """The adaptive margin: `t = δ_ref + softplus_τ(γ − δ_ref)/α`, with `softplus_τ(x) = log(1 + e^{τx})/τ`.

    The conservative constraint of arXiv 2605.20834 and the "cpo" branch of its release. With α = 1 it is the smooth
    maximum `log(e^{τδ_ref} + e^{τγ})/τ`, and τ → ∞ gives clip; 0 < α ≤ 1 guarantees t ≥ γ on every pair, and α < 1
    pushes misaligned pairs past γ. γ → −∞ is DPO.
    """

    tau: float = hyperparameter(2.0, "Sharpness of the softplus, per nat.", above=0.0)
    alpha: float = hyperparameter(1.0, "Divisor of the margin, without unit. Above 1, targets may stay below gamma.", above=0.0)

    def target(self, pairs: PairLogps) -> Tensor:
        ref_gap, gamma, tau, alpha = pairs.ref_gap, self.gamma, self.tau, self.alpha
        # log(1 + e^{τx})/τ = max(x, 0) + log(1 + e^{−τ|x|})/τ never overflows, and δ_ref + max(γ − δ_ref, 0) is
        # max(δ_ref, γ) without its rounding: all that is added for α ≤ 1 is ≥ 0, so t ≥ γ holds in floating point too.
        bend = torch.log1p(torch.exp(-tau * (gamma - ref_gap).abs())) / tau
        target = torch.clamp(ref_gap, min=gamma) + bend
        if alpha != 1.0:
            target = target + (1.0 / alpha - 1.0) * (torch.relu(gamma - ref_gap) + bend)
        return target

    def cautions(self) -> list[str]:
        if self.alpha > 1.0:
            return [
                f"alpha={self.alpha} is above 1: the softplus target can then stay below gamma={self.gamma} where the "
                "reference is misaligned, so nothing guarantees t ≥ gamma. Use 0 < alpha ≤ 1 for the guarantee."
            ]
        return []
