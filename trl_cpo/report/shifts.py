"""Reads stress.json: what holds under other prompts. What the file should not hold becomes a note."""

from dataclasses import dataclass, field
from typing import Any

from ..files.schema import BEYOND, COUNT
from .numbers import number
from .price import Estimate

FORMAT = 1
#: Columns of the table: the name in the file, the head, how it is written, and its range.
COLUMNS = {
    "gain": ("gain", "points", (-1.0, 1.0)),
    "prefers_chosen": ("prefers chosen", "%", (0.0, 1.0)),
    "in_undesirable_region": ("in U", "%", (0.0, 1.0)),
    "violations": ("violations", "%", (0.0, 1.0)),
    "gap": ("mean gap", "nats", (-BEYOND, BEYOND)),
}
#: More shifts and more faults than this are no work of `trl-cpo stress`; they are counted, not shown.
_MOST, _MOST_FAULTS, _LONGEST_NAME = 24, 4, 60


@dataclass(frozen=True)
class Shifted:
    """A row of the table: the held-out pairs under one shift.

    Attributes:
        name: of the shift.
        pairs: that were scored; None: not known.
        numbers: by their name in `COLUMNS`; one that is not known is missing.
        differences: the same minus those of the prompts as they were, on the same pairs.
    """

    name: str
    pairs: int | None
    numbers: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)


def read_shifts(document: dict[str, Any], name: str, pairs: int, gap: float | None) -> tuple[list[Shifted], list[str]]:
    """The rows in the order of the file, and notes on what was left out or is not as it should be.

    Args:
        document: what the file holds.
        name: the file's name, for the notes.
        pairs: rows of the run's pairs.json; 0: not known.
        gap: their mean gap; None: not known.
    """
    if document.get("format") != FORMAT or isinstance(document.get("format"), bool):
        return [], [f"{name} is not of format {FORMAT}, which this version reads: what holds under shift is not shown."]
    faults: list[str] = []
    shifts = document.get("shifts")
    if not isinstance(shifts, list) or not shifts:
        faults.append("shifts must be a list that is not empty")
        shifts = []
    if len(shifts) > _MOST:
        faults.append(f"it has {len(shifts)} shifts, of which {_MOST} are read")
    rows = [row for at, entry in enumerate(shifts[:_MOST]) if (row := _row(entry, f"shifts[{at}]", faults))]
    told = faults[:_MOST_FAULTS] + ([f"and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else [])
    notes = [f"{name}: {'; '.join(told)}. What is at fault is left out."] if told else []
    again = document.get("reproduced")
    if not isinstance(again, dict) or again.get("holds") is not True:
        notes.append(f"{name}: as they were, the pairs did not get the scores of pairs.json again. Do not rely on its table.")
    if pairs and document.get("held_out_pairs") != pairs:
        notes.append(f"{name} is of another number of held-out pairs than pairs.json: it is of another evaluation.")
    elif gap is not None and rows and rows[0].pairs == pairs and "gap" in rows[0].numbers:
        found = rows[0].numbers["gap"].value
        if abs(found - gap) > 0.05 * (1.0 + abs(gap)):
            notes.append(
                f"{name} says a mean gap of {found:.3g} as it was, pairs.json of {gap:.3g}: it is of another evaluation. "
                "Call trl-cpo stress again."
            )
    return rows, notes


def _row(entry: Any, where: str, faults: list[str]) -> Shifted | None:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
        faults.append(f"{where} has no name of at most {_LONGEST_NAME} characters")
        return None
    count = entry.get("pairs")
    if not COUNT.holds(count):
        faults.append(f"{where}.pairs must be {COUNT.told}")
        count = None
    apart = entry.get("difference")
    if apart is not None and not isinstance(apart, dict):
        faults.append(f"{where}.difference must be an object")
        apart = None
    return Shifted(
        name,
        None if count is None else int(count),
        _numbers(entry, where, faults, differences=False),
        _numbers(apart or {}, f"{where}.difference", faults, differences=True),
    )


def _numbers(entry: dict[str, Any], where: str, faults: list[str], *, differences: bool) -> dict[str, Estimate]:
    found = {}
    for name, (_, form, (least, most)) in COLUMNS.items():
        given = entry.get(name)
        if given is None or (isinstance(given, dict) and given.get("value") is None):
            continue
        value, low, high = (number(given.get(key)) if isinstance(given, dict) else None for key in ("value", "low", "high"))
        least = -1.0 if form == "%" and differences else least
        if value is None or not least <= value <= most:
            faults.append(f"{where}.{name} must have a value from {least:g} to {most:g}")
        elif low is None and high is None:
            found[name] = Estimate(value)
        elif (
            low is None or high is None or not least <= low <= value + _room(value) or not value - _room(value) <= high <= most
        ):
            faults.append(f"{where}.{name}: its interval must hold its value")
            found[name] = Estimate(value)
        else:
            found[name] = Estimate(value, low, high)
    return found


def _room(value: float) -> float:
    return 1e-6 * (1.0 + abs(value))  # of rounding
