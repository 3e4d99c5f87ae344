"""RLHF's optimum on a finite set of responses, and the nearest policy that prefers what it should."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checked import one_shape, positive


def rlhf_objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> float:
    """What RLHF maximises: `E_π[r] − β KL(π ‖ π_ref)`, for the responses of one prompt.

    Args:
        logps, ref_logps: log-probabilities of all responses, (Y,), nats.
        rewards: r, (Y,), in the unit of β.
        beta: β > 0, per nat of KL.
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
    """The policy nearest to `logps` among those with a gap of at least γ on every pair: the I-projection.

    `argmin KL(π ‖ π*)` subject to `log π(chosen) − log π(rejected) ≥ γ`, which for RLHF's optimum π* is RLHF under the
    hard constraint, since `E_π[r] − β KL(π ‖ π_ref) = const − β KL(π ‖ π*)`. The constraint `π(chosen) ≥ e^γ π(rejected)`
    is linear in π. For one pair, with `κ = max(0, γ − δ*)`:

        π(chosen) ∝ π*(chosen) e^{κ σ(−γ)},   π(rejected) ∝ π*(rejected) e^{−κ σ(γ)},   other responses ∝ π*,

    so `δ = max(δ*, γ)` exactly, and where γ ≥ 0 at least half of the κ nats come from lowering the rejected response.
    Several pairs have one κ ≥ 0 each, found by turns (coordinate ascent on the dual, which is concave and smooth): gaps
    are ≥ γ, and κ > 0 only where a gap is γ.

    Args:
        logps: log π*, (Y,), nats, finite; need not be normalised.
        pairs: (chosen, rejected) positions in `logps`; a response may be in several pairs.
        gamma: γ, nats, finite; any sign.
        sweeps: how many times to go over the pairs at most.
        tolerance: nats by which a gap may fall short of γ.

    Returns:
        Log-probabilities, (Y,), float64.

    Raises:
        ValueError: a value is not finite; a pair names one response twice or one that is not there; pairs contradict
            each other (a cycle that prefers each response to the next, with γ > 0, which no positive policy can meet).
        RuntimeError: `sweeps` were not enough.
    """
    (logps,) = one_shape(logps=logps)
    if not logps.isfinite().all() or not -float("inf") < gamma < float("inf"):
        raise ValueError("logps and gamma must be finite: a response of probability 0 has no gap.")
    for chosen, rejected in pairs:
        if chosen == rejected or not (0 <= chosen < len(logps) and 0 <= rejected < len(logps)):
            raise ValueError(f"Pair {(chosen, rejected)} must name two different responses of {len(logps)}.")
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
    raise RuntimeError(f"The projection on {len(pairs)} pairs still moved by {moved:.1e} nats after {sweeps} sweeps.")


def _refuse_cycles(pairs: Sequence[tuple[int, int]], responses: int) -> None:
    """Raises `ValueError` where the pairs prefer around a circle: what is left when winners of all are taken away."""
    left = set(pairs)
    while left:
        undefeated = set(range(responses)) - {rejected for _, rejected in left}
        rest = {pair for pair in left if pair[0] not in undefeated}
        if rest == left:
            raise ValueError(
                f"The pairs {sorted(left)} prefer around a circle: no policy has a gap of at least γ > 0 on all of them."
            )
        left = rest
