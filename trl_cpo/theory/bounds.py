"""Bounds the number of pairs below a threshold, given their mean loss."""

import math

#: Relative rounding error allowed in a mean of pair losses: far above float64's, far below one pair in a million.
ROUNDING = 1e-9


def most_below(mean_loss: float, count: int, margin: float, *, beta: float, rounding: float = ROUNDING) -> int:
    """The most pairs whose gap can lie more than `margin` below their target, given the mean of their losses.

    A pair with `δ < t − m` has `ℓ = softplus(β(t − δ)) > softplus(βm)`, and no loss is negative. By Markov's inequality at
    most `n L̄ / softplus(βm)` of n pairs are such; with m = 0, at most `n L̄ / log 2` have δ < t. For a threshold c below
    every target, take m = min t − c.

    Args:
        mean_loss: L̄ ≥ 0, nats: the mean of `pair_loss` over the pairs, all at the same weights, without any added loss.
        count: n ≥ 1.
        margin: m ≥ 0, nats.
        beta: β > 0, per nat.
        rounding: relative rounding error allowed in the mean.

    Returns:
        A number from 0 to n; n is the trivial bound.

    Raises:
        ValueError: a number is NaN, infinite or outside its range.
    """
    if not (0.0 <= mean_loss < math.inf and count >= 1 and 0.0 <= margin < math.inf and 0.0 < beta < math.inf):
        raise ValueError(
            "most_below needs mean_loss >= 0, count >= 1, margin >= 0 and beta > 0, all finite; "
            f"got mean_loss={mean_loss!r}, count={count!r}, margin={margin!r}, beta={beta!r}."
        )
    # softplus(x) = x + log(1 + e^−x), which does not overflow.
    each = beta * margin + math.log1p(math.exp(-beta * margin))
    ratio = mean_loss / each * (1.0 + rounding)
    return count if ratio >= 1.0 else math.floor(count * ratio)
