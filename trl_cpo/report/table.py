"""The report's tables: metrics before and after with exact intervals, settings that differ, versions."""

import json
import math
from dataclasses import dataclass

from ..constraint_names import HYPERPARAMETER_NAMES
from ..intervals import clopper_pearson
from ..logs.summary import ROWS
from .numbers import number
from .run import Evaluation, Run

#: Rows of the report in addition to those that a run prints at its end.
MORE_ROWS = (
    ("the reference prefers the rejected answer (δ_ref < 0)", "cpo/reference_misaligned", "%"),
    ("mean violation max(0, γ − δ)", "cpo/violation", "nats"),
)
#: The settings shown for a single run. For several runs, all that differ are shown.
MAIN_SETTINGS = (
    "constraint",
    *HYPERPARAMETER_NAMES,
    "logps_reduction",
    "beta",
    "loss_type",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "tokens_per_step",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "precompute_ref_log_probs",
    "bf16",
    "fp16",
    "seed",
)
#: Settings left out: where a run writes, and who may push it, do not affect training.
BESIDE_THE_POINT = {"output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "push_to_hub_token"}


@dataclass(frozen=True)
class Cell:
    """A number of the table: a fraction, with its 95 % interval if the number of pairs is known, or nats."""

    value: float
    is_fraction: bool
    interval: tuple[float, float] | None = None

    @property
    def text(self) -> str:
        if not math.isfinite(self.value):
            return "not a number" if math.isnan(self.value) else "infinite"
        return (
            f"{100 * self.value:.1f}\u00a0%"
            if self.is_fraction
            else minus(f"{self.value:+.3f}" if abs(self.value) < 1e5 else f"{self.value:+.3g}")
        )

    @property
    def interval_text(self) -> str:
        return "" if self.interval is None else f"{100 * self.interval[0]:.1f} to {100 * self.interval[1]:.1f}"


def minus(text: str) -> str:
    """`text` with a typographic minus."""
    return text.replace("-", "−")


def started_as_reference(run: Run) -> bool:
    """Whether policy and reference were the same model before training (also if unknown), so that comparing says nothing."""
    values = run.before.values if run.before else {}
    gap, ref_gap = values.get("cpo/gap"), values.get("cpo/ref_gap")
    if gap is None or ref_gap is None:
        return True
    return abs(gap - ref_gap) <= 1e-3 and abs(values.get("cpo/chosen_logps_shift", 0.0)) <= 1e-3


def cell(evaluation: Evaluation | None, metric: str, is_fraction: bool) -> Cell | None:
    """One metric of one evaluation, with the exact interval if it is a fraction; None if it is not known.

    The interval takes k = fraction · n, rounded. If that is off a whole number by more than 0.01, no interval is given.
    """
    if evaluation is None or (value := evaluation.values.get(metric)) is None:
        return None
    pairs = evaluation.pairs
    if not is_fraction or not pairs or not 0.0 <= value <= 1.0:
        return Cell(value, is_fraction)
    successes = round(value * pairs)
    exact = abs(value * pairs - successes) <= 0.01
    return Cell(value, True, clopper_pearson(successes, pairs) if exact else None)


def metric_rows(runs: list[Run]) -> list[dict]:
    """One row per metric: its label, its key, and the cells (before, after) of each run."""
    rows = []
    for label, metric, form in ROWS + MORE_ROWS:
        cells = []
        for run in runs:
            hidden = form.endswith("*") and started_as_reference(run)
            start = None if hidden else cell(run.before, metric, form.startswith("%"))
            cells.append((start, cell(run.after, metric, form.startswith("%"))))
        if any(one or other for one, other in cells):
            rows.append({"label": label, "metric": metric, "cells": cells})
    return rows


def _shown(value) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be shown"


def settings(runs: list[Run]) -> dict:
    """The main settings of one run, or the settings that differ between several.

    Returns {"rows": [(name, [text or None for each run])], "equal": number of settings not in the rows}. Runs without any
    settings count as different in none.
    """
    names = list(dict.fromkeys(name for run in runs for name in map(str, run.settings) if name not in BESIDE_THE_POINT))
    table = {name: [_shown(run.settings[name]) if name in run.settings else None for run in runs] for name in names}
    if len(runs) == 1:
        order = [name for name in MAIN_SETTINGS if name in table]
    else:
        first = [name for name in MAIN_SETTINGS if name in table]
        # A run whose settings are not known counts as different in none.
        with_any = [position for position, run in enumerate(runs) if run.settings]
        order = [
            name
            for name in first + sorted(set(names) - set(first))
            if len({table[name][position] for position in with_any}) > 1
        ]
    return {"rows": [(name, table[name]) for name in order], "equal": len(names) - len(order)}


def versions(runs: list[Run]) -> list[tuple[str, list[str | None]]]:
    """One row per library: its version in each run."""
    of_run = [got if isinstance(got := run.record.get("versions"), dict) else {} for run in runs]
    names = dict.fromkeys(str(name) for found in of_run for name in found)
    return [(name, [_shown(found[name]) if name in found else None for found in of_run]) for name in names]


def facts(run: Run) -> dict[str, str]:
    """The main facts about a run, by name."""
    pairs = run.record.get("pairs")
    pairs = pairs if isinstance(pairs, dict) else {}
    last = max([*run.training, *run.evaluations], default=None)
    seconds = number(run.record.get("seconds"))
    held_out = run.after.pairs if run.after and run.after.pairs else len(run.held_out) if run.held_out else None
    found = {
        "constraint": run.constraint,
        "γ": None if run.gamma is None else f"{run.gamma:g} {run.unit}",
        "β": run.settings.get("beta"),
        "model": run.record.get("model"),
        "data": pairs.get("dataset_name"),
        "trained on": None if "trained_on" not in pairs else f"{pairs['trained_on']} pairs",
        "held out": None if held_out is None else f"{held_out} pairs",
        "steps": last,
        "seed": run.record.get("seed"),
        "time": None if seconds is None else f"{seconds:.0f} s",
    }
    return {name: "not known" if value is None else _shown(value) for name, value in found.items()}
