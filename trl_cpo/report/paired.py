"""Two runs on the same held-out pairs: how far their fractions and gaps differ, pair by pair, with intervals."""

from dataclasses import dataclass

import numpy as np

from ..gaps import in_undesirable_region
from ..intervals import paired_difference, student
from .run import HeldOut, Run
from .table import minus


@dataclass(frozen=True)
class Difference:
    """A run's number minus another's, with its 95 % interval; None where one pair alone gives none."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """A run against another on the same n pairs; `only` and `only_other`: the pairs that prefer chosen in one run alone."""

    run: Run
    other: Run
    prefers: Difference
    in_u: Difference
    gap: Difference
    only: int
    only_other: int


def same_pairs(one: Run, other: Run) -> bool:
    """Whether both runs hold the same pairs in the same order: the reference gives every one the same log-probabilities.

    Half precision and other batches move them a little; other pairs, a reference of another kind or per-token means move
    some of them far.
    """
    if one.held_out is None or other.held_out is None or one.pairs_in_file != other.pairs_in_file:
        return False
    # A run that lacks pairs does not say which.
    if not len(one.held_out) == len(other.held_out) == one.pairs_in_file:
        return False
    return bool(np.allclose(one.held_out.reference, other.held_out.reference, rtol=5e-3, atol=0.02))


def comparable(runs: list[Run]) -> list[Run]:
    """The first run that shares its pairs with another, and all that share them with it; empty if no two do."""
    for run in runs:
        found = [other for other in runs if other is run or same_pairs(run, other)]
        if len(found) > 1:
            return found
    return []


def _of_fractions(one: np.ndarray, other: np.ndarray) -> Difference:
    only, only_other = int(np.sum(one & ~other)), int(np.sum(other & ~one))
    return Difference((only - only_other) / len(one), paired_difference(only, only_other, len(one)))


def _of_means(one: np.ndarray, other: np.ndarray) -> Difference:
    """The mean difference and Student's interval of it."""
    differences = one - other
    return Difference(float(np.mean(differences)), student(differences.tolist()))


def _in_u(pairs: HeldOut) -> np.ndarray:
    return in_undesirable_region(pairs.gap, pairs.ref_gap)


def compare(run: Run, other: Run) -> Comparison:
    """`run` minus `other`, which must hold the same pairs (`same_pairs`)."""
    mine, theirs = run.pairs, other.pairs
    prefers, other_prefers = mine.gap > 0, theirs.gap > 0
    return Comparison(
        run,
        other,
        prefers=_of_fractions(prefers, other_prefers),
        in_u=_of_fractions(_in_u(mine), _in_u(theirs)),
        gap=_of_means(mine.gap, theirs.gap),
        only=int(np.sum(prefers & ~other_prefers)),
        only_other=int(np.sum(other_prefers & ~prefers)),
    )


def comparisons(runs: list[Run]) -> list[Comparison]:
    """The first of the comparable runs against each other one."""
    found = comparable(runs)
    return [compare(run, found[0]) for run in found[1:]]


def points(difference: Difference) -> str:
    """A difference of fractions in percentage points, with its interval."""
    assert difference.interval is not None
    low, high = difference.interval
    return minus(f"{100 * difference.value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")


def sentence(comparison: Comparison) -> str:
    """What a comparison found, in words."""
    run, other = comparison.run, comparison.other
    gap, interval = comparison.gap.value, comparison.gap.interval
    nats = "" if interval is None else minus(f" ({interval[0]:+.4g} to {interval[1]:+.4g})")
    return (
        f"{run.letter} − {other.letter} on the same {len(run.pairs)} pairs: prefers chosen {points(comparison.prefers)}; in "
        f"U {points(comparison.in_u)}; mean gap {minus(f'{gap:+.4g}')}{nats} {run.unit}. Only {run.letter} prefers chosen on "
        f"{comparison.only} pairs, only {other.letter} on {comparison.only_other}."
    )
