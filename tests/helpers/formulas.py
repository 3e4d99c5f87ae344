"""Formulas that only tests need."""

import torch
from torch import Tensor


def gap_from_loss(loss: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """The preference gap that a pair's loss tells, the inverse of `pair_loss`: `δ_θ = t − log(e^ℓ − 1)/β`; +∞ where ℓ is 0."""
    # log(e^ℓ − 1) = ℓ + log(1 − e^−ℓ): e^ℓ overflows float32 from ℓ = 89 on, e^−ℓ never does.
    return target - (loss + torch.log(-torch.expm1(-loss))) / beta
