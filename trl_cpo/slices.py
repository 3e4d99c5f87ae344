"""Slices of a set of pairs: by the value of a column, numbers cut at their quartiles."""

import numpy as np

#: A column of numbers with more distinct values than this is cut at its quartiles.
_NUMBERS_AS_THEY_ARE = 8
#: The largest slices of a column that are told apart; the rest is one.
MOST_SLICES = 20
OTHERS = "(others)"


def slices_of(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Name and mask (n,) of each slice, the largest first (numbers: in order), for a column's values (n,).

    Missing values (None, NaN) are a slice of their own. Numbers of many values are cut at their quartiles; of other
    columns the largest 20 slices are told apart and the rest is "(others)".
    """
    missing = np.array([value is None or value != value for value in values], dtype=bool)
    known = values[~missing]
    numbers = len(known) > 0 and all(
        isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in known
    )
    found: list[tuple[str, np.ndarray]] = []
    if numbers and len(set(known.tolist())) > _NUMBERS_AS_THEY_ARE:
        column = np.where(missing, np.nan, values).astype(np.float64)
        edges = np.unique(np.quantile(column[~missing], [0, 0.25, 0.5, 0.75, 1]))
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            last = high == edges[-1]
            mask = (column >= low) & ((column <= high) if last else (column < high))
            found.append((f"{low:g} to {high:g}" if last else f"{low:g} to below {high:g}", mask))
    elif numbers:
        for value in sorted(set(known.tolist())):
            found.append((f"{value:g}", np.array([one == value for one in values], dtype=bool)))
    else:
        # Lists: numpy's strings lose a NUL at their end.
        names = [None if gone else str(value) for value, gone in zip(values, missing, strict=True)]
        counts: dict[str, int] = {}
        for name in names:
            if name is not None:
                counts[name] = counts.get(name, 0) + 1
        # The name breaks ties, so that the order does not hang on that of the rows.
        order = sorted(counts, key=lambda name: (-counts[name], name))
        for name in order[:MOST_SLICES]:
            found.append((name, np.array([one == name for one in names], dtype=bool)))
        if rest := set(order[MOST_SLICES:]):
            found.append((OTHERS, np.array([one in rest for one in names], dtype=bool)))
    if missing.any():
        found.append(("(missing)", missing))
    return found
