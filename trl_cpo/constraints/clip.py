"""The target margin, clipped from below."""

import torch
from torch import Tensor

from ..pairs import PairLogps
from .base import Constraint, Knobs


class Clip(Constraint):
    """The reference's gap, or γ where that is larger: `t = max(δ_ref, γ)`, so t ≥ γ on every pair.

    At γ = 0 this is HyPO (arXiv 2602.11902) and the "clip" branch of the authors' release. γ → −∞ is DPO. Pairs whose
    reference gap is at least γ train exactly as in DPO.
    """

    reads = ("gamma",)
    moves_target = True

    def target(self, pairs: PairLogps, knobs: Knobs) -> Tensor:
        return torch.clamp(pairs.ref_gap, min=knobs.gamma)
