"""Sentences for options that cannot be: what was got, and what is allowed."""

import difflib
import math
from collections.abc import Iterable


def one_of(name: str, got: object, allowed: Iterable[str]) -> str:
    """The sentence for a value that is not among the allowed names, with the nearest of them offered."""
    allowed = list(allowed)
    nearest = difflib.get_close_matches(str(got), allowed, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name} must be one of {', '.join(map(repr, allowed))}; got {got!r}.{hint}"


def is_finite(number: int | float) -> bool:
    """Whether a number is finite as a float, which an integer beyond the largest float is not."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def is_true_or_false(name: str, value: object, optional: bool = False) -> list[str]:
    """The fault of a value that must be a bool (or None), if it has one."""
    if isinstance(value, bool) or (optional and value is None):
        return []
    return [f"{name} must be {'True, False or None' if optional else 'True or False'}; got {value!r}."]
