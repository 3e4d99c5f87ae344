"""The population optimum of each form: both labels of a pair occur with their true probabilities."""

import torch
from torch import Tensor

from ..constraints import Constraint
from ..objective import pair_loss
from ..pairs import PairLogps
from .checked import one_shape, positive, probabilities
from .solver import solve


def population_loss(gap: Tensor, target: Tensor, p: Tensor, *, beta: float) -> Tensor:
    """The Bradley–Terry loss of both labels: `−p log σ(u) − (1 − p) log σ(−u)`, `u = β(δ − t)`.

    With p = 1 it is the loss of one label, which falls with δ without bound and has no finite minimiser.

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
    # Swapping gap and target turns u into −u. `where` avoids 0 · ∞: a label of probability 0 costs nothing.
    preferred, other = pair_loss(gap, target, beta=beta), pair_loss(target, gap, beta=beta)
    return torch.where(p > 0, p * preferred, 0.0) + torch.where(p < 1, (1 - p) * other, 0.0)


def population_gap(target: Tensor, p: Tensor, *, beta: float) -> Tensor:
    """The gap that minimises `population_loss`: `δ = t + logit(p)/β`; ±∞ where p is 1 or 0.

    For Bradley–Terry labels logit(p) = Δr, so DPO (t = δ_ref) gives RLHF's `δ_ref + Δr/β`. With a target t ≥ γ,
    δ ≥ γ is guaranteed if p ≥ 1/2, and not otherwise.

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


def population_gaps(form: Constraint, pairs: PairLogps, p: Tensor) -> Tensor:
    """The gap of each pair at a form's population optimum.

    For a form that adds nothing to the loss it is `population_gap` at the form's own target, a closed form. For any other
    form it is solved numerically from the form's `target` and `added_loss` (`trl_cpo.theory.solver`), or refused.
    `population_penalty` and `population_lagrangian` are closed forms of two of those.

    Args:
        form: a constraint with its hyperparameters, such as `CONSTRAINTS["clip"](beta=0.1, gamma=1.0)`.
        pairs: log-probabilities, (B,), nats of `form.logps_reduction`; only the reference's are read.
        p: (B,), probability that the chosen response is preferred, in [0, 1].

    Returns:
        (B,), float64, nats; ±∞ where there is no finite optimum.

    Raises:
        ValueError: as `population_loss`, or the form cannot be solved (`trl_cpo.theory.solver.solve`).
    """
    if form.adds_loss:
        return solve(form, pairs, p)[0]
    return population_gap(form.target(pairs), p, beta=form.beta)


def alignment_threshold(pairs: PairLogps, p: Tensor, *, beta: float) -> float:
    """The threshold γ*: for γ > γ*, the population optimum of "inverse_prob" has δ > 0 on every pair.

    `γ* = max(0, max_i −(β δ_ref,i + logit p_i) / (1/π_ref(chosen) + 1/π_ref(rejected)))` (arXiv 2605.20834, Thm 4.9). At a
    positive γ* itself, the worst pair has δ = 0.

    Args:
        pairs: log-probabilities, (B,), nats; only the reference's are read.
        p: (B,), in (0, 1].
        beta: β > 0, per nat.

    Raises:
        ValueError: as `population_loss`.
    """
    ref_chosen, ref_rejected, p = one_shape(ref_chosen=pairs.ref_chosen, ref_rejected=pairs.ref_rejected, p=p)
    free = population_gap(ref_chosen - ref_rejected, p, beta=beta)
    lifts = torch.exp(-ref_chosen) + torch.exp(-ref_rejected)
    return max(0.0, (-beta * free / lifts).max().item())
