"""The target margin raised by the reference's perplexities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pairs import PairLogps
from .base import Constraint


@dataclass(frozen=True)
class InverseProb(Constraint):
    """The margin of the paper's stationary form: `t = δ_ref + (γ/β)(1/π_ref(chosen) + 1/π_ref(rejected))`.

    arXiv 2605.20834, Eq. 17. With mean log-probabilities 1/π is the response's perplexity under the reference; with
    sums it is e^{−s}, beyond any float for real responses, and is refused. t > δ_ref for γ > 0, but t ≥ γ is not
    guaranteed. γ = 0 is DPO.
    """

    def target(self, pairs: PairLogps) -> Tensor:
        perplexities = torch.exp(-pairs.ref_chosen) + torch.exp(-pairs.ref_rejected)
        # A perplexity past the largest float would make the loss infinite and its gradient NaN; the largest finite
        # target pushes as hard as a pair can be pushed.
        largest = torch.finfo(perplexities.dtype).max
        raised = (self.gamma / self.beta) * torch.clamp(perplexities, max=largest)
        return pairs.ref_gap + torch.clamp(raised, max=largest**0.5)

    def faults(self) -> list[str]:
        if self.logps_reduction == "sum":
            return [
                "constraint='inverse_prob' needs logps_reduction='mean': of summed log-probabilities 1/π_ref is "
                "e^{−s_ref}, beyond any float for real responses. Averaged per token it is the reference's perplexity."
            ]
        return []

    def cautions(self) -> list[str]:
        said = "gamma=0 makes constraint='inverse_prob' plain DPO: set gamma > 0 (the release's demo uses 0.05)."
        return [said] if self.gamma == 0.0 else []
