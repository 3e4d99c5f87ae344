"""Where each constraint's loss has its optimum, when both labels of a pair are drawn with their true probability."""

import torch
from torch import Tensor

from ..constraints import Constraint
from ..objective import pair_loss
from ..pairs import PairLogps
from .checked import one_shape, positive, probabilities
from .solver import solve


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


def population_gaps(form: Constraint, pairs: PairLogps, p: Tensor) -> Tensor:
    """The population optimum of a form of the constraint: the gap of each pair.

    Of a form that adds nothing to the loss it is `population_gap` at the form's own target, a closed form. Of any other it
    is solved numerically from the form's `target` and `added_loss` (`trl_cpo.theory.solver`), or refused;
    `population_penalty` and `population_lagrangian` are closed forms of two of them.

    Args:
        form: with its hyperparameters, such as `CONSTRAINTS["clip"](beta=0.1, gamma=1.0)`.
        pairs: of which the reference's log-probabilities are read, (B,), nats of `form.logps_reduction`.
        p: (B,), the probability that the chosen response is preferred, in [0, 1].

    Returns:
        (B,), float64, nats; ±∞ where no finite gap is best.

    Raises:
        ValueError: as `population_loss`, or the form cannot be solved (`trl_cpo.theory.solver.solve`).
    """
    if form.adds_loss:
        return solve(form, pairs, p)[0]
    return population_gap(form.target(pairs), p, beta=form.beta)


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
