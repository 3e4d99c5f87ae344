"""The table of groups: what was asked of each one's pairs, what came of it, and its multiplier."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .numbers import number
from .run import Evaluation, Run
from .table import Cell, cell, minus


@dataclass(frozen=True)
class Group:
    """A row of the table; None or empty: not known.

    Attributes:
        name: the value of the run's `group_column`.
        pairs: held-out pairs with it.
        gamma: the gap asked for, in the run's unit.
        before, after: share that prefers chosen.
        violations: share after training whose gap is below `gamma`.
        allowed: what its bound allows, in words.
        weight: the last λ of training.
        bound: whether the bound holds on the held-out pairs, and if not by how much it is missed.
    """

    name: str
    pairs: int | None
    gamma: float | None
    before: Cell | None
    after: Cell | None
    violations: Cell | None
    allowed: str
    weight: float | None
    bound: str


def groups(run: Run) -> list[Group]:
    """The groups of a run's last evaluation, by name; none where it has none."""
    values = run.after.values if run.after else {}
    head, tail = "cpo/", "/prefers_chosen"
    rests = [name[len(head) :] for name in values if name.startswith(head)]
    names = [rest[: -len(tail)] for rest in rests if rest.endswith(tail)]
    return [_group(run, name) for name in sorted(names)]


def _group(run: Run, name: str) -> Group:
    before, after = _of(run.before, name), _of(run.after, name)
    values = after.values if after else {}
    slack = _finite(values.get("slack"))
    is_share = run.settings.get("dual_signal") == "violation_rate"
    epsilon = _own(run.settings, "epsilon", name)
    allowed = "" if slack is None or epsilon is None else f"{100 * epsilon:g}\u00a0% of pairs" if is_share else f"{epsilon:g}"
    bound = ""
    if slack is not None:
        missed = f"{-100 * slack:.0f} points" if is_share else f"{-slack:.3g}"
        bound = "holds" if slack >= 0 else f"missed by {missed}"
    weights = [found for step in sorted(run.training) if (found := run.training[step].get(f"cpo/{name}/lambda")) is not None]
    return Group(
        name=name,
        pairs=after.pairs if after else None,
        gamma=_own(run.settings, "gamma", name),
        before=cell(before, "prefers_chosen", True),
        after=cell(after, "prefers_chosen", True),
        violations=cell(after, "violation_rate", True),
        allowed=allowed,
        weight=weights[-1] if weights else None,
        bound=bound,
    )


def _of(evaluation: Evaluation | None, name: str) -> Evaluation | None:
    """A group's part of an evaluation, its metrics without `cpo/<group>/`."""
    if evaluation is None:
        return None
    start = f"cpo/{name}/"
    values = {key[len(start) :]: value for key, value in evaluation.values.items() if key.startswith(start)}
    pairs = _finite(values.get("pairs"))
    return Evaluation(evaluation.step, values, int(pairs) if pairs is not None and pairs >= 0 and pairs == int(pairs) else None)


def _finite(value: float | None) -> float | None:
    """A number of a file, which may be NaN or infinite there."""
    return value if value is not None and math.isfinite(value) else None


def _own(settings: Mapping[str, Any], field: str, name: str) -> float | None:
    """A setting of a group: its own, else that of all."""
    own = settings.get(f"{field}_by_group")
    return number(own[name]) if isinstance(own, Mapping) and name in own else number(settings.get(field))


def shown_weight(group: Group) -> str:
    """λ as text."""
    return "–" if group.weight is None else minus(f"{group.weight:.3g}")
