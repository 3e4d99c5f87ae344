"""The pairwise loss at a target margin, and its inverse."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import full_precision


def _checked(*tensors: Tensor) -> list[Tensor]:
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"Expected tensors of one shape (B,), got {[tuple(t.shape) for t in tensors]}.")
    return [full_precision(t) for t in tensors]


def pair_loss(gap: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """The loss of each pair at its target margin.

    `ℓ = −log σ(β (δ_θ − t))`; `t = δ_ref` is DPO (arXiv 2305.18290, Eq. 7), another target is a margin form of CPO
    (arXiv 2605.20834, Eq. 17).

    Args:
        gap: δ_θ, (B,), nats.
        target: t, (B,), in the same unit as `gap` (both of sums, or both of means).
        beta: β > 0, per nat.

    Returns:
        (B,), nats, float32 at least. Nothing is reduced.

    Raises:
        ValueError: a shape is not (B,).
    """
    gap, target = _checked(gap, target)
    return -F.logsigmoid(beta * (gap - target))


def gap_from_loss(loss: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """The preference gap that a pair's loss tells: `δ_θ = t − log(e^ℓ − 1)/β`, the inverse of `pair_loss` in the gap.

    Args:
        loss: ℓ > 0, (B,), nats.
        target: t, (B,), nats.
        beta: β > 0, per nat.

    Returns:
        (B,), nats; +∞ where the loss has rounded to 0.

    Raises:
        ValueError: a shape is not (B,).
    """
    loss, target = _checked(loss, target)
    # log(e^ℓ − 1) = ℓ + log(1 − e^−ℓ): e^ℓ overflows float32 from ℓ = 89 on, e^−ℓ never does.
    return target - (loss + torch.log(-torch.expm1(-loss))) / beta
