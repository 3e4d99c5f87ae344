"""The pair loss at a target margin. Tests compare TRL's own loss with it."""

import torch.nn.functional as F
from torch import Tensor

from .pairs import full_precision


def pair_loss(gap: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """The loss of each pair at its target margin: `ℓ = −log σ(β (δ_θ − t))`.

    `t = δ_ref` gives DPO (arXiv 2305.18290, Eq. 7); other targets give the margin forms of CPO (arXiv 2605.20834, Eq. 17).

    Args:
        gap: δ_θ, (B,), nats.
        target: t, (B,), in the same unit as `gap` (both of sums, or both of means).
        beta: β > 0, per nat.

    Returns:
        (B,), nats, float32 or wider, not reduced.

    Raises:
        ValueError: a shape is not (B,).
    """
    if gap.dim() != 1 or gap.shape != target.shape:
        raise ValueError(f"Expected tensors of one shape (B,), got {[tuple(gap.shape), tuple(target.shape)]}.")
    return -F.logsigmoid(beta * (full_precision(gap) - full_precision(target)))
