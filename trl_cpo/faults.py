"""Error sentences for invalid options: what was got, and what is allowed."""

import difflib
import math
from collections.abc import Iterable


def one_of(name: str, got: object, allowed: Iterable[str]) -> str:
    """The error sentence for a value that is not an allowed name; suggests the nearest one."""
    allowed = list(allowed)
    nearest = difflib.get_close_matches(str(got), allowed, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name} must be one of {', '.join(map(repr, allowed))}; got {got!r}.{hint}"


def is_finite(number: int | float) -> bool:
    """Whether a number is finite as a float; an integer beyond the largest float is not."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def is_true_or_false(name: str, value: object, optional: bool = False) -> list[str]:
    """A list with the error sentence if `value` is not a bool (or None, if `optional`); else an empty list."""
    if isinstance(value, bool) or (optional and value is None):
        return []
    return [f"{name} must be {'True, False or None' if optional else 'True or False'}; got {value!r}."]
