"""Solves numerically for the population optimum of any form, from its own target and added loss."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..constraints import Constraint
from ..pairs import PairLogps
from .checked import one_shape, positive, probabilities

#: Points at which convexity is checked, as fractions of the width of the search.
_SHARES = torch.logspace(-10, 0, 26, dtype=torch.float64)


def solve(form: Constraint, pairs: PairLogps, p: Tensor) -> tuple[Tensor, float]:
    """The gaps that minimise the population loss of both labels plus the form's added loss, and the multiplier there.

    `min_δ Σ_i [−p_i log σ(u_i) − (1 − p_i) log σ(−u_i) + a_i(δ_i)]`, `u_i = β(δ_i − t_i)`, where t and a are the form's
    `target` and `added_loss`. Solved by bisection on the slope of each pair, to 1e-13 relative. A form with a `dual_rule`
    adds `λ v_i(δ_i)`; λ is then the least with `mean_i v_i ≤ ε`, not capped, by bisection to 1e-12 relative.

    Args:
        form: a constraint with its hyperparameters.
        pairs: log-probabilities, (B,), nats of `form.logps_reduction`; only the reference's are read.
        p: (B,), probability that the chosen response is preferred, in [0, 1].

    Returns:
        The gaps, (B,), float64, nats, ±∞ where there is no finite optimum; and λ, per nat, 0 for a form without one.

    Raises:
        ValueError: an argument is out of range, or the form cannot be solved this way. That is so if a pair's added loss
            depends on more than that pair's gap, or the pair's loss is not convex in the gap (checked at some 150 points)
            or falls without bound; if no multiplier meets the bound; or if the multiplier is not driven by the added loss.
    """
    problem = _Problem(form, pairs, p)
    rule = form.dual_rule
    if rule is None:
        problem.check(0.0)
        return problem.minimum(0.0), 0.0
    if rule.signal != "violation":
        problem.refuse(f"its multiplier is driven by {rule.signal!r}, and a bound on that is not a convex constraint")
    problem.check(form.beta)
    gaps = problem.minimum(0.0)
    if problem.mean_violation(gaps) <= rule.epsilon:
        return gaps, 0.0
    low, high = 0.0, form.beta
    while problem.mean_violation(problem.minimum(high)) > rule.epsilon:
        low, high = high, 2.0 * high
        if high > 1e12 * form.beta:
            problem.refuse(f"no multiplier brings its mean violation to epsilon={rule.epsilon:g}")
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if problem.mean_violation(problem.minimum(middle)) <= rule.epsilon else (middle, high)
    return problem.minimum(high), high


class _Problem:
    """The loss of each pair as a function of its gap, (B,) each."""

    def __init__(self, form: Constraint, pairs: PairLogps, p: Tensor):
        chosen, rejected, self._p = one_shape(ref_chosen=pairs.ref_chosen, ref_rejected=pairs.ref_rejected, p=p)
        probabilities(self._p)
        positive(beta=form.beta)
        self._form, self._reference = form, (chosen, rejected)
        self._target = form.target(self._pairs(torch.zeros_like(chosen)))
        self._width = 1e4 * (1.0 / form.beta + self._target.abs() + abs(form.gamma) + 1.0)

    def refuse(self, why: str):
        raise ValueError(
            f"The population optimum of {self._form} cannot be solved numerically: {why}. Derive it by hand, or minimise "
            "over policies numerically."
        )

    def _pairs(self, gap: Tensor, shift: float = 0.0) -> PairLogps:
        return PairLogps(gap + shift, torch.full_like(gap, shift), *self._reference)

    def _added(self, gap: Tensor, multiplier: float, shift: float = 0.0) -> Tensor:
        added = self._form.added_loss(self._pairs(gap, shift), multiplier)
        return torch.zeros_like(gap) if added is None else added

    def _push(self, gap: Tensor, multiplier: float) -> Tensor:
        """The slope of the added loss."""
        gap = gap.detach().requires_grad_()
        added = self._added(gap, multiplier)
        if not added.requires_grad:
            return torch.zeros_like(gap)
        return torch.autograd.grad(added.sum(), gap)[0]

    def _slope(self, gap: Tensor, multiplier: float) -> Tensor:
        u, p, beta = self._form.beta * (gap - self._target), self._p, self._form.beta
        return beta * ((1 - p) * torch.sigmoid(u) - p * torch.sigmoid(-u)) + self._push(gap, multiplier)

    def mean_violation(self, gap: Tensor) -> float:
        return self._added(gap, 1.0).mean().item()

    def _points(self) -> Tensor:
        """Gaps at which the form is checked, (N, B), ascending: near the target, near γ, near 0 and far from all."""
        centres = (self._target, torch.full_like(self._target, self._form.gamma), torch.zeros_like(self._target))
        steps = torch.cat([-_SHARES.flip(0), torch.zeros(1, dtype=torch.float64), _SHARES]).unsqueeze(1) * self._width
        return torch.cat([centre + steps for centre in centres]).sort(dim=0).values

    def _halves(self) -> Iterator[Tensor]:
        """Masks, (B,), such that for any two pairs some mask holds one and not the other."""
        index = torch.arange(len(self._p))
        for bit in range(max(1, len(self._p) - 1).bit_length()):
            yield (index >> bit) % 2 == 0
            yield (index >> bit) % 2 == 1

    def check(self, multiplier: float) -> None:
        """Raises `ValueError` if bisection on the slope would not find the optimum."""
        points = self._points()
        added = torch.stack([self._added(gap, multiplier) for gap in points])
        if added.isnan().any():
            self.refuse("its added loss is NaN at some gap")
        for gap, alone in zip(points[::20], added[::20], strict=True):
            if not torch.allclose(self._added(gap, multiplier, shift=-3.0), alone, rtol=1e-6):
                self.refuse("its added loss depends on more of the policy than the gap")
            for kept in self._halves():
                moved = self._added(torch.where(kept, gap, gap + 1.0), multiplier)
                if not torch.allclose(moved[kept], alone[kept], rtol=1e-9):
                    self.refuse("the added loss of a pair depends on other pairs")
            twice = self._added(gap, 2 * multiplier)
            if self._form.dual_rule is not None and not torch.allclose(twice, 2 * alone, rtol=1e-9):
                self.refuse("its added loss is not proportional to its multiplier")
        slopes = torch.stack([self._slope(gap, multiplier) for gap in points]).nan_to_num(torch.nan, 1e300, -1e300)
        if not (slopes.diff(dim=0) >= -1e-9 * slopes[:-1].abs().clamp(min=self._form.beta)).all():
            self.refuse("its loss is not convex in the gap")

    def minimum(self, multiplier: float) -> Tensor:
        """The gap of each pair at which the slope stops being negative."""
        low, high = self._target - self._width, self._target + self._width
        lowest, highest = self._push(low, multiplier), self._push(high, multiplier)
        # With p = 0 or 1 the loss itself has no minimum: at the far end its slope rounds to 0.
        downhill, uphill = (self._p == 0) & (lowest == 0), (self._p == 1) & (highest == 0)
        ends = self._slope(low, multiplier), self._slope(high, multiplier)
        if not ((ends[0] < 0) | downhill).all() or not ((ends[1] > 0) | uphill).all():
            self.refuse("its loss falls without bound")
        for _ in range(200):
            middle = low + (high - low) / 2
            below = self._slope(middle, multiplier) < 0
            if (high - low <= 1e-13 * (1.0 + middle.abs())).all():
                break
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        high = torch.where(uphill, torch.inf, high)
        return torch.where(downhill, -torch.inf, high)
