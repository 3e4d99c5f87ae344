"""A hyperparameter of a constraint: declared once, with its default, its help and its bounds, in the form that reads it."""

import math
from dataclasses import Field, field
from typing import Any

from .faults import is_finite, one_of

#: Above this a number times a log-probability, or a square, overflows float32.
LARGEST = 1e15


def hyperparameter(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    infinite: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a form that a user sets by its name; the config, its checks and the command line follow from it.

    Args:
        default: None leaves the value to the form, which may derive it from β.
        help: what it is, with its unit.
        at_least, above: the lowest value allowed, or the value to stay above. A number has one of them.
        infinite: whether it may be +∞.
        choices: of a string, the values allowed.

    Raises:
        TypeError: it has neither a bound nor choices, or both.
    """
    if [at_least is not None, above is not None, bool(choices)].count(True) != 1:
        raise TypeError("A hyperparameter has one of at_least=, above= and choices=.")
    about = {"help": help, "at_least": at_least, "above": above, "infinite": infinite, "choices": choices}
    return field(default=default, kw_only=True, metadata=about)


def bounds(declared: Field) -> str:
    """The bounds in a few characters, such as ">= 0"; empty for a string."""
    about = declared.metadata
    if about["choices"]:
        return ""
    sign, lowest = (">", about["above"]) if about["at_least"] is None else (">=", about["at_least"])
    return f"{sign} {lowest:g}"


def fault(declared: Field, value: Any) -> str | None:
    """What is wrong with a value, in a sentence; None where it is allowed."""
    about, name = declared.metadata, declared.name
    if about["choices"]:
        return None if value in about["choices"] else one_of(name, value, about["choices"])
    if value is None and declared.default is None:
        return None
    whole = declared.type in (int, "int")
    kind = "whole number" if whole else "number" if about["infinite"] else "finite number"
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    is_number = is_number and (is_finite(value) or (about["infinite"] and value == math.inf))
    if is_number and LARGEST < value < math.inf:
        return f"{name} must be at most {LARGEST:g}, as losses are computed in float32; got {value!r}."
    if is_number and (value > about["above"] if about["at_least"] is None else value >= about["at_least"]):
        return None
    return f"{name} must be a {kind} {bounds(declared).replace('>=', '≥')}; got {value!r}."
