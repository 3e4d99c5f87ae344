"""What stress.json holds: shares and mean gaps of each shift with their intervals, and their paired differences."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..files.run_files import STRESS
from ..gaps import in_undesirable_region
from ..intervals import clopper_pearson, paired_difference, student
from .measure import Gaps, Measured
from .recorded import Recorded, StressError
from .shifts import BASE, SHIFTS, Options

MADE_BY, FORMAT = "trl-cpo stress", 1
#: The shares, in the order of the tables.
SHARES = ("prefers_chosen", "in_undesirable_region", "violations")
NOT_MEASURED = (
    "Not measured: what the model itself answers to these prompts (only the given answers are scored), prompts that differ in "
    "other ways, and other training seeds."
)


def document(run: Recorded, measured: Measured, options: Options) -> dict[str, Any]:
    """The whole document, for a run that was measured."""
    base = measured.shifts[BASE]
    named = {shift.name: shift.what for shift in SHIFTS}
    return {
        "made_by": MADE_BY,
        "format": FORMAT,
        "model": run.model,
        "dataset_name": run.dataset,
        "split": run.split,
        "reduction": run.reduction,
        "gamma": run.gamma,
        "seed": options.seed,
        "typo_rate": options.typo_rate,
        "systems": list(options.systems),
        "held_out_pairs": len(run.rows),
        "reproduced": {"holds": measured.reproduced, "largest_difference": measured.largest},
        "shifts": [
            {"name": name, "what": named[name], **of_shift(gaps, base, measured.gammas)}
            for name, gaps in measured.shifts.items()
        ],
        "not_applied": [{"name": name, "why": why} for name, why in measured.not_applied.items()],
        "not_measured": NOT_MEASURED,
    }


def of_shift(gaps: Gaps, base: Gaps, gammas: np.ndarray) -> dict[str, Any]:
    """One shift's numbers; `difference` is it minus `base` on the pairs that both have, null for `base` itself.

    Args:
        gammas: γ of every pair that was taken.
    """
    found: dict[str, Any] = {
        "pairs": len(gaps.at),
        "changed": gaps.changed,
        "left_out": gaps.left_out,
        **{name: _share(holds) for name, holds in _conditions(gaps, gammas).items()},
        "gap": _mean(gaps.gap),
        # Of the policy over the reference under these prompts, which may be easier or harder for both.
        "gain": _paired(gaps.gap > 0, gaps.ref_gap > 0),
        "difference": None,
    }
    if gaps is not base:
        _, here, there = np.intersect1d(gaps.at, base.at, assume_unique=True, return_indices=True)
        mine, theirs = _conditions(gaps, gammas), _conditions(base, gammas)
        found["difference"] = {
            "pairs": len(here),
            **{name: _paired(mine[name][here], theirs[name][there]) for name in SHARES},
            "gap": _mean(gaps.gap[here] - base.gap[there]),
        }
    return found


def _conditions(gaps: Gaps, gammas: np.ndarray) -> dict[str, np.ndarray]:
    holds = (gaps.gap > 0, in_undesirable_region(gaps.gap, gaps.ref_gap), gaps.gap < gammas[gaps.at])
    return dict(zip(SHARES, holds, strict=True))


def _share(holds: np.ndarray) -> dict[str, float | None]:
    if not len(holds):
        return _number(None, None)
    count = int(np.count_nonzero(holds))
    return _number(count / len(holds), clopper_pearson(count, len(holds)))


def _paired(mine: np.ndarray, theirs: np.ndarray) -> dict[str, float | None]:
    if not len(mine):
        return _number(None, None)
    only, only_other = int(np.sum(mine & ~theirs)), int(np.sum(theirs & ~mine))
    return _number((only - only_other) / len(mine), paired_difference(only, only_other, len(mine)))


def _mean(values: np.ndarray) -> dict[str, float | None]:
    return _number(float(values.mean()), student(values.tolist())) if len(values) else _number(None, None)


def _number(value: float | None, interval: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high}


def stress_file(folder: Path) -> Path:
    """Where the document goes: a file of an earlier call is replaced, another's never.

    Raises:
        StressError: it may not be written there.
    """
    file = folder / STRESS
    if not os.access(folder, os.W_OK):
        raise StressError(f"{folder} cannot be written into. Copy the run elsewhere, and give the copy.")
    if not os.path.lexists(file):
        return file
    try:
        made_by = json.loads(file.read_text(encoding="utf-8"))["made_by"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        made_by = None
    if made_by != MADE_BY:
        raise StressError(f"{file} is there, and is not of trl-cpo stress. Nothing is overwritten: move it away.")
    return file
