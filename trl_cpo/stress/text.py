"""The document of a stress test as a table for people."""

import textwrap
from typing import Any

from ..quoting import escaped
from ..units import UNITS
from .document import SHARES

_WIDTH = 112
_HEADS = {"prefers_chosen": "prefers chosen", "in_undesirable_region": "in U", "violations": "violations"}
Number = dict[str, float | None]


def render(document: dict[str, Any]) -> str:
    """The table, what was left out, whether the run's own numbers came again, and what is not measured."""
    lines = [
        f"Held-out pairs of {escaped(document['dataset_name'])} ({escaped(document['split'])}) under other prompts; reference "
        f"{escaped(document['model'])}",
        f"γ = {document['gamma']:g}, gaps in {UNITS[document['reduction']]}. gain: prefers chosen, less that of the reference. "
        "In brackets: 95 %",
        "intervals. Second lines: the difference to the prompts as they were, on the same pairs.",
        "",
        *_table(
            [["", "pairs", "gain", *_HEADS.values(), "mean gap"], *(row for one in document["shifts"] for row in _rows(one))]
        ),
        "",
    ]
    for shift in document["shifts"]:
        lines += _wrapped(_told(shift))
    for one in document["not_applied"]:
        lines += _wrapped(f"{one['name']}: left out; {escaped(one['why'])}.")
    lines += [*_wrapped(reproduced(document)), *_wrapped(document["not_measured"])]
    return "\n".join(lines)


def reproduced(document: dict[str, Any]) -> str:
    """Whether the run's numbers came again, in a sentence."""
    found = document["reproduced"]
    apart = f"the largest difference of a log-probability is {found['largest_difference']:.2g} nats"
    if found["holds"]:
        return f"As it was, the scores are those of pairs.json within rounding: {apart}."
    return (
        f"WARNING: as it was, the scores are NOT those of pairs.json: {apart}. Model, reference, precision or pairs are others "
        "than the run's, and so may be every number here."
    )


def _rows(shift: dict[str, Any]) -> list[list[str]]:
    """A shift's numbers, and below them its differences."""
    apart = shift["difference"]
    first = [
        shift["name"],
        str(shift["pairs"]),
        _points(shift["gain"]),
        *(_percent(shift[name]) for name in SHARES),
        _nats(shift["gap"]),
    ]
    if apart is None:
        return [first]
    return [first, ["", "", "", *(_points(apart[name]) for name in SHARES), _nats(apart["gap"])]]


def _percent(number: Number) -> str:
    value, low, high = number["value"], number["low"], number["high"]
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" + ("" if low is None or high is None else f" ({100 * low:.0f}–{100 * high:.0f})")


def _points(number: Number) -> str:
    value, low, high = number["value"], number["low"], number["high"]
    if value is None:
        return "–"
    ends = "" if low is None or high is None else f" ({100 * low:+.0f}…{100 * high:+.0f})"
    return f"{100 * value:+.1f}{ends}".replace("-", "−")


def _nats(number: Number) -> str:
    value, low, high = number["value"], number["low"], number["high"]
    if value is None:
        return "–"
    return (f"{value:+.3g}" + ("" if low is None or high is None else f" ({low:+.3g}…{high:+.3g})")).replace("-", "−")


def _told(shift: dict[str, Any]) -> str:
    """What a row cannot say: whether its preferences changed for certain, and which pairs it is of."""
    parts = []
    if shift["difference"] is not None:
        found = shift["difference"]["prefers_chosen"]
        if found["value"] is None:
            parts.append("no pair could be compared")
        elif found["high"] < 0:
            parts.append("fewer pairs prefer the chosen answer than as it was")
        elif found["low"] > 0:
            parts.append("more pairs prefer the chosen answer than as it was")
        else:
            parts.append("no change of preferences beyond chance")
        parts.append(f"{shift['changed']} prompts changed ({shift['what']})")
    parts += [f"{count} pairs left out: {escaped(why)}" for why, count in shift["left_out"].items()]
    return f"{shift['name']}: {'; '.join(parts)}." if parts else ""


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
