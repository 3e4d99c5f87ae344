"""Where each constraint's loss has its optimum, when both labels of a pair are drawn with their true probability."""

import torch
from torch import Tensor

from ..constraints import CONSTRAINTS, Knobs
from ..objective import pair_loss
from ..pairs import PairLogps
from .checked import one_shape, positive, probabilities
from .lagrangian import population_lagrangian, population_penalty


def population_loss(gap: Tensor, target: Tensor, p: Tensor, *, beta: float) -> Tensor:
    """The Bradley–Terry loss of both labels: `−p log σ(u) − (1 − p) log σ(−u)`, `u = β(δ − t)`.

    With p = 1 it is the loss of one label, which falls with δ for ever and has no finite minimiser.

    Args:
        gap, target: δ and t, (B,), nats.
        p: (B,), probability that the chosen response is preferred.
        beta: β > 0, per nat.

    Returns:
        (B,), float64, nats.

    Raises:
        ValueError: a shape is not (B,), a value is NaN, p lies outside [0, 1], β is not positive.
    """
    gap, target, p = one_shape(gap=gap, target=target, p=p)
    probabilities(p)
    positive(beta=beta)
    # Exchanging gap and target turns u into −u. 0 · ∞ is no number: a label that never comes costs nothing.
    preferred, other = pair_loss(gap, target, beta=beta), pair_loss(target, gap, beta=beta)
    return torch.where(p > 0, p * preferred, 0.0) + torch.where(p < 1, (1 - p) * other, 0.0)


def population_gap(target: Tensor, p: Tensor, *, beta: float) -> Tensor:
    """The gap that minimises `population_loss`: `δ = t + logit(p)/β`; ±∞ where p is 1 or 0.

    For Bradley–Terry labels logit(p) = Δr, so DPO (t = δ_ref) has RLHF's `δ_ref + Δr/β`. A target t ≥ γ gives δ ≥ γ
    where p ≥ 1/2, and not otherwise.

    Args:
        target: t, (B,), nats.
        p: (B,), in [0, 1].
        beta: β > 0, per nat.

    Returns:
        (B,), float64, nats.

    Raises:
        ValueError: as `population_loss`.
    """
    target, p = one_shape(target=target, p=p)
    probabilities(p)
    positive(beta=beta)
    return target + torch.logit(p) / beta


def population_gaps(constraint: str, pairs: PairLogps, p: Tensor, knobs: Knobs) -> Tensor:
    """The population optimum of a constraint, by its name: the gap of each pair, free of every other pair's but for λ.

    Margin forms: `population_gap` at the constraint's own target; "penalty": `population_penalty`; "lagrangian":
    `population_lagrangian` at `knobs.epsilon`, driven by the violation and its λ not capped (it never exceeds β).

    Args:
        constraint: a name in `CONSTRAINTS`.
        pairs: of which the reference's log-probabilities are read, (B,), nats of `knobs.logps_reduction`.
        p: (B,), in [0, 1].
        knobs: β and what the constraint reads.

    Returns:
        (B,), float64, nats.

    Raises:
        ValueError: the constraint is unknown, or as `population_loss`.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint must be one of {', '.join(CONSTRAINTS)}; got {constraint!r}.")
    if constraint == "penalty":
        return population_penalty(p, pairs.ref_gap, beta=knobs.beta, gamma=knobs.gamma, weight=knobs.penalty_weight)
    if constraint == "lagrangian":
        return population_lagrangian(p, pairs.ref_gap, knobs.beta, knobs.gamma, knobs.epsilon)[0]
    return population_gap(CONSTRAINTS[constraint].target(pairs, knobs), p, beta=knobs.beta)


def alignment_threshold(pairs: PairLogps, p: Tensor, *, beta: float) -> float:
    """The γ* above which "inverse_prob" has its population optimum at δ > 0 on every pair (arXiv 2605.20834, Thm 4.9).

    `γ* = max_i −(β δ_ref,i + logit p_i) / (1/π_ref(chosen) + 1/π_ref(rejected))`, and 0 where that is negative. At γ*
    itself, if it is positive, the worst pair has δ = 0: the guarantee is for γ > γ*.

    Args:
        pairs: of which the reference's log-probabilities are read, (B,), nats.
        p: (B,), in (0, 1].
        beta: β > 0, per nat.

    Raises:
        ValueError: as `population_loss`.
    """
    ref_chosen, ref_rejected, p = one_shape(ref_chosen=pairs.ref_chosen, ref_rejected=pairs.ref_rejected, p=p)
    free = population_gap(ref_chosen - ref_rejected, p, beta=beta)
    lifts = torch.exp(-ref_chosen) + torch.exp(-ref_rejected)
    return max(0.0, (-beta * free / lifts).max().item())
