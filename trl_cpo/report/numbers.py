"""Numbers out of JSON, which may hold anything."""

import math


def number(value) -> float | None:
    """`value` as a float if it is a number (NaN and infinities too), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
