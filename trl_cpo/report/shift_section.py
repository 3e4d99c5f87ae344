"""The page's table "Under shift": numbers with their intervals, and what differs from the prompts as they were."""

from .price import Estimate
from .shifts import COLUMNS, Shifted
from .table import minus

HEADS = tuple(head for head, *_ in COLUMNS.values())


def cells(row: Shifted) -> list[tuple[str, str, str] | None]:
    """Of each column its number, its interval, and its difference, as texts, empty where not known; None without a number."""
    return [
        None if name not in row.numbers else _cell(row.numbers[name], row.differences.get(name), form)
        for name, (_, form, _) in COLUMNS.items()
    ]


def _cell(one: Estimate, apart: Estimate | None, form: str) -> tuple[str, str, str]:
    ends = _ends(one, form)
    value = f"{_written(one.value, form)}\u00a0%" if form == "%" else _written(one.value, form)
    if apart is None:
        return value, ends, ""
    change = "nats" if form == "nats" else "points"
    around = _ends(apart, change)
    return value, ends, _written(apart.value, change) + (f" ({around})" if around else "")


def _ends(one: Estimate, form: str) -> str:
    return "" if one.low is None or one.high is None else f"{_written(one.low, form)} to {_written(one.high, form)}"


def _written(value: float, form: str) -> str:
    if form == "%":
        return f"{100 * value:.1f}"
    return minus(f"{100 * value:+.1f}" if form == "points" else f"{value:+.3g}")
