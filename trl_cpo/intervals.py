"""Confidence intervals: of a fraction, exact (Clopper–Pearson), of two fractions of the same things, and of a mean."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

CONFIDENCE = 0.95


def _checked(successes: int, trials: int, confidence: float) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"An interval needs 0 <= successes <= trials and trials >= 1; got {successes} of {trials}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence!r}.")


def lower_bound(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The exact one-sided lower bound of a fraction: the `p` with `P(X ≥ k | n, p) = 1 − confidence`, and 0 if k = 0.

    It is the (1 − confidence) quantile of Beta(k, n − k + 1) (Clopper and Pearson, Biometrika 26, 1934).

    Raises:
        ValueError: unless 0 ≤ k ≤ n, n ≥ 1 and 0 < confidence < 1.
    """
    from scipy.special import betaincinv

    _checked(successes, trials, confidence)
    return 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, 1.0 - confidence))


def clopper_pearson(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval of a fraction, (lower, upper), with (1 − confidence)/2 outside each end.

    The upper end is one minus the lower bound of the fraction of failures.

    Raises:
        ValueError: as `lower_bound`.
    """
    one_sided = (1.0 + confidence) / 2
    _checked(successes, trials, confidence)
    return lower_bound(successes, trials, one_sided), 1.0 - lower_bound(trials - successes, trials, one_sided)


def _bisected(above: Callable[[float], bool], low: float, high: float) -> float:
    """Where `above`, true at `low` and false at `high`, changes."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return (low + high) / 2


def paired_difference(only_first: int, only_second: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval of p₁ − p₂ for two fractions of the same `trials` things, (lower, upper).

    It holds the differences that the score test of McNemar's kind does not reject (Tango, Statistics in Medicine 17,
    1998). Only the things in which the two differ matter. Near its level at any number of trials, also where no two
    differ, but not exact.

    Args:
        only_first, only_second: the things that count for the first fraction alone, and for the second alone.

    Raises:
        ValueError: unless both are 0 or more, with a sum of at most `trials` ≥ 1, and 0 < confidence < 1.
    """
    if only_first < 0 or only_second < 0 or not 1 <= trials >= only_first + only_second:
        raise ValueError(
            "A difference needs counts of 0 or more whose sum is at most the number of trials, 1 or more; got "
            f"{only_first} and {only_second} of {trials}."
        )
    _checked(0, trials, confidence)
    bound = NormalDist().inv_cdf((1.0 + confidence) / 2)

    def score(difference: float) -> float:
        # The likeliest p of "only second" under this difference solves a x² + b x + c = 0.
        a = 2.0 * trials
        b = (2.0 * trials - only_first + only_second) * difference - only_first - only_second
        c = -only_second * difference * (1.0 - difference)
        only = (math.sqrt(max(0.0, b * b - 4.0 * a * c)) - b) / (2.0 * a)
        variance = trials * (2.0 * only + difference * (1.0 - difference))
        off = only_first - only_second - trials * difference
        return off / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, off) if off else 0.0

    found = (only_first - only_second) / trials
    lower = -1.0 if score(-1.0) <= bound else _bisected(lambda difference: score(difference) > bound, -1.0, found)
    upper = 1.0 if score(1.0) >= -bound else _bisected(lambda difference: score(difference) >= -bound, found, 1.0)
    return lower, upper


def student(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's interval of a mean, (lower, upper); None of fewer than two values.

    Raises:
        ValueError: unless 0 < confidence < 1.
    """
    from scipy.special import stdtrit

    _checked(0, 1, confidence)
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stdtrit(count - 1, (1.0 + confidence) / 2)) * deviation / math.sqrt(count)
    return mean - half, mean + half
