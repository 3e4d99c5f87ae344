"""The target margin, clipped from below."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pairs import PairLogps
from .base import Constraint


@dataclass(frozen=True)
class Clip(Constraint):
    """The reference's gap, or γ where that is larger: `t = max(δ_ref, γ)`, so t ≥ γ on every pair.

    At γ = 0 this is HyPO (arXiv 2602.11902) and the "clip" branch of the authors' release. γ → −∞ is DPO. Pairs whose
    reference gap is at least γ train exactly as in DPO.
    """

    def target(self, pairs: PairLogps) -> Tensor:
        return torch.clamp(pairs.ref_gap, min=self.gamma)
