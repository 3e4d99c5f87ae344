"""RLHF's optimum on a finite set of responses, and its projection on the constraint."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checked import one_shape, positive


def rlhf_objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> float:
    """RLHF's objective `E_π[r] − β KL(π ‖ π_ref)`, over the responses to one prompt.

    Args:
        logps, ref_logps: log-probabilities of all responses, (Y,), nats.
        rewards: r, (Y,), in the unit of β.
        beta: β > 0, per nat of KL.

    Raises:
        ValueError: a shape is not (Y,), a value is NaN, β is not positive.
    """
    logps, ref_logps, rewards = one_shape(logps=logps, ref_logps=ref_logps, rewards=rewards)
    positive(beta=beta)
    return (logps.exp() * (rewards - beta * (logps - ref_logps))).sum().item()


def rlhf_optimum(ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """RLHF's optimum, `π* ∝ π_ref exp(r/β)`; its gaps are `δ* = δ_ref + Δr/β` (arXiv 2305.18290, Eq. 4).

    Args:
        ref_logps: log-probabilities of all responses under the reference, (Y,), nats.
        rewards: r, (Y,), in the unit of β.
        beta: β > 0.

    Returns:
        Log-probabilities, (Y,), float64.

    Raises:
        ValueError: a shape is not (Y,), a value is NaN, β is not positive.
    """
    ref_logps, rewards = one_shape(ref_logps=ref_logps, rewards=rewards)
    positive(beta=beta)
    return torch.log_softmax(ref_logps + rewards / beta, dim=0)


def constrained_optimum(
    logps: Tensor, pairs: Sequence[tuple[int, int]], *, gamma: float, sweeps: int = 100_000, tolerance: float = 1e-12
) -> Tensor:
    """The I-projection: of all policies with a gap of at least γ on every pair, the nearest to `logps`.

    It is `argmin KL(π ‖ π*)` subject to `log π(chosen) − log π(rejected) ≥ γ`. For RLHF's optimum π* it solves RLHF under
    the hard constraint, since `E_π[r] − β KL(π ‖ π_ref) = const − β KL(π ‖ π*)`. The constraint
    `π(chosen) ≥ e^γ π(rejected)` is linear in π. For one pair, with `κ = max(0, γ − δ*)`:

        π(chosen) ∝ π*(chosen) e^{κ σ(−γ)},   π(rejected) ∝ π*(rejected) e^{−κ σ(γ)},   other responses ∝ π*,

    so `δ = max(δ*, γ)` exactly. If γ ≥ 0, at least half of the κ nats come from lowering the rejected response.
    Several pairs have one κ ≥ 0 each, found by coordinate ascent on the dual, which is concave and smooth. At the solution
    every gap is at least γ, and κ > 0 only where the gap equals γ.

    Args:
        logps: log π*, (Y,), nats, finite; need not be normalised.
        pairs: (chosen, rejected) positions in `logps`; a response may be in several pairs.
        gamma: γ, nats, finite; any sign.
        sweeps: most passes over the pairs.
        tolerance: nats by which a gap may fall short of γ.

    Returns:
        Log-probabilities, (Y,), float64.

    Raises:
        ValueError: a value is not finite; a pair names one response twice, or one that does not exist; with γ > 0, pairs
            form a cycle in which each response is preferred to the next, which no positive policy can meet.
        RuntimeError: not converged after `sweeps`.
    """
    (logps,) = one_shape(logps=logps)
    if not logps.isfinite().all() or not -float("inf") < gamma < float("inf"):
        raise ValueError("logps and gamma must be finite. Leave out responses of probability 0: they have no gap.")
    for chosen, rejected in pairs:
        if chosen == rejected or not (0 <= chosen < len(logps) and 0 <= rejected < len(logps)):
            raise ValueError(f"A pair must name two different responses, 0 to {len(logps) - 1}; got {(chosen, rejected)}.")
    if gamma > 0:
        _refuse_cycles(pairs, len(logps))
    up, down = torch.sigmoid(torch.tensor([-gamma, gamma], dtype=torch.float64)).tolist()
    score = logps.tolist()
    kappa = [0.0] * len(pairs)
    for _ in range(sweeps):
        moved = 0.0
        for k, (chosen, rejected) in enumerate(pairs):
            step = max(-kappa[k], gamma - (score[chosen] - score[rejected]))
            kappa[k] += step
            score[chosen] += step * up
            score[rejected] -= step * down
            moved = max(moved, abs(step))
        if moved <= tolerance:
            return torch.log_softmax(torch.tensor(score, dtype=torch.float64), dim=0)
    raise RuntimeError(
        f"The projection on {len(pairs)} pairs still moved by {moved:.1e} nats after {sweeps} sweeps; raise "
        f"sweeps or the tolerance of {tolerance:g}."
    )


def _refuse_cycles(pairs: Sequence[tuple[int, int]], responses: int) -> None:
    """Raises `ValueError` if the pairs contain a cycle: what is left once the wins of undefeated responses are removed."""
    left = set(pairs)
    while left:
        undefeated = set(range(responses)) - {rejected for _, rejected in left}
        rest = {pair for pair in left if pair[0] not in undefeated}
        if rest == left:
            raise ValueError(
                f"The pairs {sorted(left)} contain a cycle: no policy has a gap of at least γ > 0 on all of them. Remove "
                "one, or take γ ≤ 0."
            )
        left = rest
