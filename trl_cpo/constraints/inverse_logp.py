"""The margin of the release's "easy" branch, for parity with it."""

from dataclasses import dataclass

from torch import Tensor

from ..pairs import PairLogps
from .base import Constraint


@dataclass(frozen=True)
class InverseLogp(Constraint):
    """The release's "easy" margin: `t = δ_ref + (γ/β)(1/s_ref(chosen) + 1/s_ref(rejected))`.

    Log-probabilities are negative, so for γ > 0 this *lowers* the target below DPO's, the opposite of the method's
    purpose (worked case: β 2.5, γ 0.05, s_ref = (−1.2, −1.4): margin −0.0774). It is here so that runs of the release
    can be repeated. γ = 0 is DPO.
    """

    def target(self, pairs: PairLogps) -> Tensor:
        # A response that the reference is certain of has s_ref = 0, and 1/s_ref would be infinite; −1e-6 nats stands
        # for certainty.
        nearest = -1e-6
        margin = 1.0 / pairs.ref_chosen.clamp(max=nearest) + 1.0 / pairs.ref_rejected.clamp(max=nearest)
        return pairs.ref_gap + (self.gamma / self.beta) * margin

    def cautions(self) -> list[str]:
        if self.gamma == 0.0:
            return ["gamma=0 makes constraint='inverse_logp' plain DPO: set gamma > 0 (the release's demo uses 0.05)."]
        return [
            "constraint='inverse_logp' is the release's 'easy' branch, kept for parity. Because log-probabilities are "
            "negative, its target lies BELOW DPO's: it relaxes the loss on every pair instead of constraining the gap. "
            "To constrain it, use 'clip' or 'softplus'."
        ]
