"""Preference by sums and by means of the same pairs, and how each follows the length of the answers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files.run_files import PAIR_COLUMNS, TOKEN_COLUMNS


def by_length(pairs: Mapping[str, Any]) -> dict[str, dict[str, float | None]] | None:
    """Of "sum" and "mean": the share of pairs where the policy prefers chosen, and the gap's rank correlation with length.

    The correlation is Spearman's, of δ_θ with `tokens(chosen) − tokens(rejected)`; None where one of them is constant.

    Args:
        pairs: what pairs.json holds. None is returned where it has no pairs, or not the tokens of their answers.
    """
    if not pairs["rows"] or not set(TOKEN_COLUMNS) <= set(pairs["columns"]):
        return None
    rows, columns = np.array(pairs["rows"], dtype=float), list(pairs["columns"])
    logps, tokens = (rows[:, [columns.index(name) for name in names]] for names in (PAIR_COLUMNS[:2], TOKEN_COLUMNS))
    if (tokens < 1).any():
        return None
    by = {"sum": logps, "mean": logps / tokens} if pairs["reduction"] == "sum" else {"sum": logps * tokens, "mean": logps}
    longer = tokens[:, 0] - tokens[:, 1]
    found = {}
    for reduction, values in by.items():
        gap = values[:, 0] - values[:, 1]
        found[reduction] = {"prefers_chosen": float((gap > 0).mean()), "correlation": _spearman(gap, longer)}
    return found


def in_words(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """The two in one sentence."""
    parts = []
    for reduction, values in found.items():
        correlation = values["correlation"]
        follows = (
            "" if correlation is None else f" (its gap's rank correlation with the difference in length: {correlation:+.2f})"
        )
        parts.append(f"by {reduction}s the policy prefers chosen on {100 * (values['prefers_chosen'] or 0):.0f} %{follows}")
    return "; ".join(parts)


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    from scipy.stats import rankdata

    if len(one) < 3 or (one == one[0]).all() or (other == other[0]).all():
        return None
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])
