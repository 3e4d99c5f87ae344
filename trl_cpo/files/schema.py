"""The numbers in the documents of a run and in certificates: what each one can be. Every reader asks here.

Numbers are known by their names, wherever they stand; a number whose name is not listed has to be finite.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..quoting import escaped

#: No log-probability is so large; arithmetic on larger numbers could overflow.
BEYOND = 1e15
#: No document of a run is nested so deeply.
_DEEPEST = 40
_PREFIX = re.compile(r"eval_(?:.+?_)?(?=cpo/|rewards/)|eval_")


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included; `whole` ones alone."""

    told: str
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def holds(self, value: Any) -> bool:
        return is_number(value) and self.low <= value <= self.high and (not self.whole or value == int(value))


FINITE = Range("a finite number")
COUNT = Range("a whole number, 0 or more", 0, 2**53, whole=True)
SHARE = Range("a number from 0 to 1", 0, 1)
AT_LEAST_0 = Range("a number, 0 or more", 0)
NATS = Range("a number of nats", -BEYOND, BEYOND)

#: By name, without the prefix of an evaluation.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("step", "held_out_pairs", "left_out", "trained_on_left_out", "bytes", "pairs", "meeting"), COUNT),
    **dict.fromkeys(("total", "kept", "seed", "format"), COUNT),
    **dict.fromkeys(("cpo/pairs", "cpo/incomparable_pairs", "cpo/nonfinite_pairs"), COUNT),
    **dict.fromkeys(("prefers_chosen", "at_least", "confidence", "certified_share"), SHARE),
    **{
        f"cpo/{name}": SHARE
        for name in (
            "prefers_chosen",
            "beats_reference",
            "in_undesirable_region",
            "violation_rate",
            "reference_misaligned",
            "escaped",
            "holds",
            "repetition",
            "repetition_general",
            "answers_ended",
            "answers_ended_general",
        )
    },
    **{f"cpo/answer_tokens{ending}": AT_LEAST_0 for ending in ("", "_general")},
    "rewards/accuracies": SHARE,
    **dict.fromkeys(("cpo/violation", "cpo/lambda"), Range("a number of nats, 0 or more", 0, BEYOND)),
    **dict.fromkeys(("seconds", "runtime", "train_runtime", "epoch", "grad_norm"), AT_LEAST_0),
    "gamma": NATS,
}


def is_number(value: Any) -> bool:
    """Whether a value out of JSON is a finite number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def range_of(name: str) -> Range | None:
    """The range of the number of that name, which may be an evaluation's; None where the name is not listed."""
    found = RANGES.get(_PREFIX.sub("", name, count=1))
    return NATS if found is None and "cpo/" in name else found


def fault(name: str, value: Any) -> str | None:
    """What is wrong with a value of that name, in words; None: nothing. Null is a number that is not known."""
    known = range_of(name)
    if value is None or (isinstance(value, (dict, list)) and (known is None or "/" not in name)):
        return None
    if known is None:
        if isinstance(value, (bool, str)) or is_number(value):
            return None
        known = FINITE
    if name == "gamma" and isinstance(value, str):  # an infinite option, as text
        return None
    return None if known.holds(value) else f"{escaped(name)} must be {known.told}; got {shown(value)}"


def shown(value: Any) -> str:
    """A value, short."""
    try:
        text = repr(value)
    except ValueError:  # of a number with thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"


def faults(document: Any, path: str = "", *, finite: bool = True, depth: int = 0) -> Iterator[str]:
    """What is wrong with the numbers of a document, a line each. Its "rows" are left to whoever reads them.

    Args:
        document: out of JSON.
        path: of the document.
        finite: whether NaN and infinities are wrong too.
        depth: of the document in a larger one.
    """
    if depth > _DEEPEST:
        yield f"{path[:40]}… is nested more than {_DEEPEST} deep"
        return
    for name, inner in _items(document):
        if name == "rows":
            continue
        here = f"{path}{escaped(str(name))}"
        wrong = None if not finite and isinstance(inner, float) and not math.isfinite(inner) else fault(str(name), inner)
        if wrong is not None:
            yield wrong if not path else f"{path}{wrong}"
        else:
            yield from faults(inner, f"{here}.", finite=finite, depth=depth + 1)


def sound(document: Any, *, finite: bool = True, depth: int = 0) -> Any:
    """The document without the numbers that `faults` complains of: null in their place."""
    if not isinstance(document, (dict, list)):
        return document
    if depth > _DEEPEST:
        return None

    def part(name: Any, inner: Any) -> Any:
        if name == "rows" or (not finite and isinstance(inner, float) and not math.isfinite(inner)):
            return inner
        return None if fault(str(name), inner) is not None else sound(inner, finite=finite, depth=depth + 1)

    parts = [(name, part(name, inner)) for name, inner in _items(document)]
    return dict(parts) if isinstance(document, dict) else [inner for _, inner in parts]


def _items(document: Any) -> list[tuple[Any, Any]]:
    if isinstance(document, dict):
        return list(document.items())
    return list(enumerate(document)) if isinstance(document, list) else []
