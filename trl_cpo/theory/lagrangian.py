"""Population optima of the policy-side forms: DPO plus a hinge on the gap, whose weight is fixed or solved for."""

import torch
from torch import Tensor

from .checked import one_shape, positive, probabilities


def population_penalty(p: Tensor, ref_gap: Tensor, *, beta: float, gamma: float, weight: float) -> Tensor:
    """The gaps that minimise the population loss of both labels plus a hinge.

    They minimise `mean_i [−p_i log σ(u_i) − (1 − p_i) log σ(−u_i)] + λ mean_i max(0, γ − δ_i)`, with
    `u_i = β(δ_i − δ_ref,i)`. The sum is strictly convex and separates into one problem for each δ_i:
    `δ_i = max(δ_ref,i + logit(p_i)/β, min(γ, δ_ref,i + logit(p_i + λ/β)/β))`, where `logit` is +∞ from 1 on.

    Proof: below γ the derivative `β(σ(u_i) − p_i) − λ` vanishes at the second term of the minimum. Above γ the derivative
    `β(σ(u_i) − p_i)` vanishes at the free optimum. If neither zero lies on its own side of γ, the minimum is at γ.

    Args:
        p: (B,), probability that the chosen response is preferred, in [0, 1].
        ref_gap: δ_ref, (B,), nats.
        beta: β > 0, per nat.
        gamma: γ, nats.
        weight: λ ≥ 0, per nat.

    Returns:
        (B,), float64, nats; ±∞ where p is 1 or 0 and there is no finite optimum.

    Raises:
        ValueError: a shape is not (B,), p lies outside [0, 1], β is not positive, λ is negative or NaN.
    """
    p, ref_gap = one_shape(p=p, ref_gap=ref_gap)
    probabilities(p)
    positive(beta=beta)
    if not weight >= 0.0:
        raise ValueError(f"weight must be >= 0; got {weight!r}.")
    pushed = (p + weight / beta).clamp(max=1.0)
    free = ref_gap + torch.logit(p) / beta
    return torch.maximum(free, (ref_gap + torch.logit(pushed) / beta).clamp(max=gamma))


def population_lagrangian(p: Tensor, ref_gap: Tensor, beta: float, gamma: float, epsilon: float) -> tuple[Tensor, float]:
    """The gaps and the multiplier that minimise the population loss of both labels with a mean hinge of at most ε.

    `min_δ mean_i [−p_i log σ(u_i) − (1 − p_i) log σ(−u_i)]` subject to `mean_i max(0, γ − δ_i) ≤ ε`, with
    `u_i = β(δ_i − δ_ref,i)`. The gaps are `population_penalty`'s at the least λ ≥ 0 that meets the constraint. The mean
    hinge falls continuously in λ, so either λ = 0 or the constraint is tight. For ε = 0,
    `λ = max(0, β max_i (σ(β(γ − δ_ref,i)) − p_i))`; every larger λ is a multiplier as well.

    Args:
        p, ref_gap, beta, gamma: as for `population_penalty`.
        epsilon: ε ≥ 0, nats; may be infinite.

    Returns:
        The gaps, (B,), float64, nats, and λ, per nat. The constraint holds up to rounding. Where β(γ − δ_ref) exceeds
        about 25, λ's float64 resolution moves the gaps by more than 1e-4/β.

    Raises:
        ValueError: as `population_penalty`, or ε is negative or NaN.
    """
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be >= 0; got {epsilon!r}.")

    def solved(weight: float) -> tuple[Tensor, float]:
        gaps = population_penalty(p, ref_gap, beta=beta, gamma=gamma, weight=weight)
        return gaps, torch.relu(gamma - gaps).mean().item()

    gaps, violation = solved(0.0)
    if violation <= epsilon:
        return gaps, 0.0
    chances, references = one_shape(p=p, ref_gap=ref_gap)
    enough = beta * (torch.sigmoid(beta * (gamma - references)) - chances).max().item()
    if epsilon == 0.0:
        # At the least λ, rounding may leave a pair just below γ, where the constraint requires exactly γ.
        return torch.maximum(gaps, torch.full_like(gaps, gamma)), enough
    low, high = 0.0, enough
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if solved(middle)[1] <= epsilon else (middle, high)
    return solved(high)[0], high
