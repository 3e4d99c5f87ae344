"""Exact confidence intervals for a fraction (Clopper–Pearson), computed from the number of successes."""

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


def paired_difference(gained: int, lost: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a difference of two fractions of the same trials, given how many changed, (lower, upper).

    `gained` trials failed before and succeed now, `lost` the other way round. Given that m = gained + lost changed, gained is
    binomial; its Clopper–Pearson interval (a, b) gives `m/n · (2a − 1)` to `m/n · (2b − 1)`. The interval excludes 0 where
    the exact McNemar test rejects.

    Raises:
        ValueError: a count is negative, more trials changed than there are, or confidence is not between 0 and 1.
    """
    changed = gained + lost
    if gained < 0 or lost < 0 or not max(changed, 1) <= trials:
        raise ValueError(f"Of {trials} trials, {gained} cannot have been gained and {lost} lost.")
    if changed == 0:
        return 0.0, 0.0
    low, high = clopper_pearson(gained, changed, confidence)
    return changed / trials * (2 * low - 1), changed / trials * (2 * high - 1)
