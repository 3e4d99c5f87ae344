"""Numbers with their 95 % intervals, as the audit's document holds them.

All of them take the pairs as independent draws; where prompts repeat that is too narrow, and the audit says so.
"""

import math

import numpy as np

from ..intervals import CONFIDENCE, clopper_pearson

#: Resamples of a bootstrap, fewer for very many pairs, where the interval is narrow anyhow.
RESAMPLES, _DRAWS_AT_MOST = 1000, 100_000_000
#: Below so many pairs in one of two groups a bootstrap of their shares says nothing.
_SMALLEST_GROUP = 5


def fraction(holds: np.ndarray) -> dict:
    """The fraction of pairs for which a condition holds, k of n, with Clopper and Pearson's exact interval."""
    k, n = int(np.count_nonzero(holds)), len(holds)
    low, high = clopper_pearson(k, n) if n else (None, None)
    return {"k": k, "n": n, "value": k / n if n else None, "low": low, "high": high}


def quantile(values: np.ndarray, q: float) -> dict:
    """The q-quantile of n values, a value that occurs, with the exact distribution-free interval of order statistics.

    `[X_(l), X_(u)]` with the largest l and the least u such that `P(Bin(n, q) < l)` and `P(Bin(n, q) ≥ u)` are at most
    2.5 % each (David and Nagaraja, Order Statistics, 7.1). An end that n values cannot give is None.
    """
    from scipy.stats import binom

    n = len(values)
    if n == 0:
        return {"n": 0, "value": None, "low": None, "high": None}
    ordered, tail = np.sort(values), (1 - CONFIDENCE) / 2
    low, high = int(binom.ppf(tail, n, q)), int(binom.ppf(1 - tail, n, q)) + 1
    return {
        "n": n,
        "value": float(ordered[max(0, math.ceil(q * n) - 1)]),
        "low": float(ordered[low - 1]) if low >= 1 else None,
        "high": float(ordered[high - 1]) if high <= n else None,
    }


def shares(weights: np.ndarray, inside: np.ndarray, seed: int = 0) -> list[dict]:
    """The part of each of m totals that falls to a group of pairs, `Σ_inside w / Σ w`, with percentile bootstrap intervals.

    Pairs are drawn again with replacement, with their weights and their group, for all m at once. No interval where fewer
    than 5 pairs are on either side, or all weight is 0.

    Args:
        weights: (n, m), ≥ 0.
        inside: (n,), the mask of the group.
    """
    n, m = weights.shape
    part, whole = np.where(inside[:, None], weights, 0.0), weights
    totals = zip(part.sum(axis=0), whole.sum(axis=0), strict=True)
    documents = [{"value": float(a / b) if b > 0 else None, "low": None, "high": None} for a, b in totals]
    if min(np.count_nonzero(inside), np.count_nonzero(~inside)) < _SMALLEST_GROUP:
        return documents
    random, columns = np.random.default_rng(seed), np.concatenate([part, whole], axis=1)
    draws, at_once = max(200, min(RESAMPLES, _DRAWS_AT_MOST // n)), max(1, 1_000_000 // n)
    sums = []
    for start in range(0, draws, at_once):
        counts = random.multinomial(n, np.full(n, 1 / n), size=min(at_once, draws - start))
        sums.append(counts @ columns)
    parts, wholes = np.split(np.concatenate(sums), 2, axis=1)
    for column, document in enumerate(documents):
        # A draw may miss all the weight.
        some = wholes[:, column] > 0
        if document["value"] is not None and some.any():
            ratio = parts[some, column] / wholes[some, column]
            document["low"], document["high"] = map(float, np.quantile(ratio, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    return documents


def rank_correlation(x: np.ndarray, y: np.ndarray) -> dict:
    """Spearman's ρ of two columns, with the interval of Bonett and Wright (Psychometrika 65, 2000).

    `tanh(atanh ρ ± z √((1 + ρ²/2)/(n − 3)))`. None where a column is constant, and no interval below 10 pairs.
    """
    from scipy.stats import norm, spearmanr

    n = len(x)
    document = {"n": n, "value": None, "low": None, "high": None}
    if n < 3 or (x == x[0]).all() or (y == y[0]).all():
        return document
    rho = float(np.clip(spearmanr(x, y).statistic, -1.0, 1.0))
    document["value"] = rho
    if n < 10:
        return document
    if abs(rho) > 1 - 1e-12:
        return {**document, "low": rho, "high": rho}
    half = norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return {**document, "low": math.tanh(math.atanh(rho) - half), "high": math.tanh(math.atanh(rho) + half)}
