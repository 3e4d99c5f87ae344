"""Where DPO fails on a pair: Assumption 3.1, the undesirable region, the pull of the loss, and the escape time."""

import math

import torch
from torch import Tensor

from .. import gaps
from .checked import one_shape, positive


def assumption_holds(ref_gap: Tensor, reward_gap: Tensor, *, beta: float) -> Tensor:
    """Whether each pair meets Assumption 3.1 of arXiv 2605.20834: RLHF's optimum prefers chosen, `δ_ref + Δr/β > 0`.

    Args:
        ref_gap: δ_ref, (B,), nats.
        reward_gap: Δr = r(chosen) − r(rejected), (B,), in the unit of β.
        beta: β > 0.

    Returns:
        (B,), bool.

    Raises:
        ValueError: a shape is not (B,), a value is NaN, β is not positive.
    """
    ref_gap, reward_gap = one_shape(ref_gap=ref_gap, reward_gap=reward_gap)
    positive(beta=beta)
    return ref_gap + reward_gap / beta > 0


def in_undesirable_region(gap: Tensor, ref_gap: Tensor) -> Tensor:
    """Whether each pair lies in the undesirable region: `U = {δ_ref < δ < 0}` (arXiv 2605.20834, Def. 3.3).

    There DPO's loss has fallen, yet the policy still prefers the rejected response.

    Args:
        gap, ref_gap: δ and δ_ref, (B,), nats.

    Returns:
        (B,), bool; true only where δ_ref < 0.

    Raises:
        ValueError: a shape is not (B,), a value is NaN.
    """
    gap, ref_gap = one_shape(gap=gap, ref_gap=ref_gap)
    return gaps.in_undesirable_region(gap, ref_gap)


def pull(gap: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """The pull of a pair's loss on its gap: `−∂ℓ/∂δ = β σ(−β(δ − t))`, which falls as δ grows (Prop. 3.4).

    Args:
        gap, target: δ and t, (B,), nats; t = δ_ref is DPO.
        beta: β > 0, per nat.

    Returns:
        (B,), float64, per nat.

    Raises:
        ValueError: a shape is not (B,), a value is NaN, β is not positive.
    """
    gap, target = one_shape(gap=gap, target=target)
    positive(beta=beta)
    return beta * torch.sigmoid(-beta * (gap - target))


def soft_margin_excess(gap: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """The pair loss over β minus the margin loss: `softplus(β(t − δ))/β − max(0, t − δ) = log(1 + e^{−β|t − δ|})/β`.

    It lies in (0, log 2/β] and is highest at δ = t (Prop. 5.1 of arXiv 2605.20834). So DPO is nearly margin ranking with
    the margin t = δ_ref, which is negative where the reference is misaligned.

    Args:
        gap, target: δ and t, (B,), nats.
        beta: β > 0, per nat.

    Returns:
        (B,), float64, nats; 0 where it underflows.

    Raises:
        ValueError: a shape is not (B,), a value is NaN, β is not positive.
    """
    gap, target = one_shape(gap=gap, target=target)
    positive(beta=beta)
    return torch.log1p(torch.exp(-beta * (target - gap).abs())) / beta


def escape_time(start: Tensor, end: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """The time that gradient flow on a pair's loss takes to move its gap from δ₀ to δ₁.

    `dδ/ds = β σ(−β(δ − t))` gives `s = (δ₁ − δ₀)/β + (e^{β(δ₁ − t)} − e^{β(δ₀ − t)})/β²`. From −D to 0 it
    is `D/β + (e^{βD} − 1)/β²` for DPO started at its reference (t = −D), exponential in βD. For a target γ ≥ 0 it is
    `D/β + (e^{−βγ} − e^{−β(D + γ)})/β²`, at most `2D/β`.

    The flow treats δ as one free number. A model shares its parameters between pairs and uses another optimizer, so these
    times do not count a run's steps; use their ratios to compare targets and pairs.

    Args:
        start, end, target: δ₀, δ₁, t, (B,), nats.
        beta: β > 0, per nat.

    Returns:
        (B,), float64, nats² (learning rate × steps, with loss and gap in nats); 0 where δ₁ ≤ δ₀, +∞ where it overflows.

    Raises:
        ValueError: a shape is not (B,), a value is NaN, β is not positive.
    """
    start, end, target = one_shape(start=start, end=end, target=target)
    positive(beta=beta)
    way = (end - start).clamp(min=0.0)
    # e^a − e^b = e^{a + log(1 − e^{b − a})} subtracts no large numbers, and e^a alone may overflow where this does not.
    bend = torch.exp(beta * (end - target) + torch.log(-torch.expm1(-beta * way)) - 2 * math.log(beta))
    return torch.where(way > 0, way / beta + bend, 0.0)
