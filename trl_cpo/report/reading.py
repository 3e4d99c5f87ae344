"""Reads a run's folder, complete or not: missing and broken files become notes, never errors."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..files import schema
from ..files.masking import masked
from ..files.run_files import LOG, METRICS, PAIRS, PRICE, STRESS
from ..logs.log_file import read_log
from .numbers import number
from .pair_reading import read_pairs
from .price import of_metrics, read_price
from .run import Evaluation, Run
from .shifts import read_shifts

#: More runs than this cannot be told apart by colour and line style.
MOST_RUNS = 12
_EVALUATION_KEY = re.compile(r"(eval(?:_.+?)?)_cpo/")


class NotARun(Exception):
    """The folders given allow no report. The message says why, and what to give."""


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Reads the runs; letters them in the order given, and gives them distinct names.

    Raises:
        NotARun: a folder does not exist, holds no file of a run, or is given twice; or there are more than `MOST_RUNS`.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) > MOST_RUNS:
        raise NotARun(f"At most {MOST_RUNS} runs fit one report; got {len(paths)}. Make several reports.")
    whole = [path.resolve() for path in paths]
    for position, path in enumerate(whole):
        if path in whole[:position]:
            raise NotARun(f"The run {paths[position]} is given twice. Give each run once.")
    runs = [read_run(path) for path in paths]
    for run, letter, name in zip(runs, "ABCDEFGHIJKL", _names(whole), strict=False):
        run.letter, run.name = letter, name
    return runs


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that are all distinct."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(part for part in path.parts[-depth:] if part != path.anchor) or str(path) for path in paths]


def read_run(folder: str | Path) -> Run:
    """Reads one run's folder. Raises `NotARun` if it is not a run's."""
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise NotARun(f"{path} {what}. Give the folder that a training run wrote (with {LOG} in it).")
    if not any((path / name).is_file() for name in (LOG, METRICS, PAIRS)):
        raise NotARun(
            f"{path} is not the folder of a run: it holds none of {LOG}, {METRICS} and {PAIRS}. Give the output folder of "
            "`trl-cpo train` or of examples/hh_rlhf.py."
        )
    run = Run(path)
    run.record = _object(run, METRICS, "its settings, versions and final metrics are not known")
    config = run.record.get("config")
    run.settings = dict(config) if isinstance(config, dict) else {}
    if run.record and not run.settings:
        run.notes.append(f"{METRICS} has no config: the run's settings are not known.")
    table = _object(run, PAIRS, "there are no pictures of single pairs")
    if table:
        read_pairs(run, table)
    _read_log(run)
    _before_and_after(run)
    _cross_check(run)
    _read_price(run)
    if (run.folder / STRESS).is_file() and (document := _object(run, STRESS, "what holds under shift is not shown")):
        whole = run.held_out is not None and len(run.held_out) == run.pairs_in_file
        run.shifts, notes = read_shifts(document, STRESS, run.pairs_in_file, float(run.pairs.gap.mean()) if whole else None)
        run.notes += notes
    return run


def _object(run: Run, name: str, otherwise: str) -> dict:
    """The JSON object in a file of the run; if it is missing or broken, an empty object and a note."""
    file = run.folder / name
    if not file.is_file():
        run.notes.append(f"{name} is missing: {otherwise}.")
        return {}
    try:
        got = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        run.notes.append(f"{name} cannot be read ({type(error).__name__}: {str(error)[:120]}): {otherwise}.")
        return {}
    if not isinstance(got, dict):
        run.notes.append(f"{name} holds a {type(got).__name__} instead of an object: {otherwise}.")
        return {}
    # The readers of these two say where each fault is.
    return got if name in (PRICE, STRESS) else _sound(run, name, got)


def _sound(run: Run, name: str, got: dict) -> dict:
    """The document without numbers that cannot be, and a note where there are any."""
    wrong = list(schema.faults(got))
    if wrong:
        run.notes.append(f"{name} holds {len(wrong)} numbers that cannot be, which are left out. The first: {wrong[0]}.")
    return masked(schema.sound(got))


def _read_price(run: Run) -> None:
    """Takes the measurements from price.json, and what it lacks from the evaluations, which have no intervals or answers."""
    if (run.folder / PRICE).is_file():
        document = _object(run, PRICE, "sampled answers are not shown")
        if document:
            run.prices, notes = read_price(document, PRICE)
            run.notes += notes
    logged = {step: of_metrics(step, evaluation.values.get) for step, evaluation in run.evaluations.items()}
    if run.prices:
        run.prices = [measurement.filled_from(logged.get(measurement.step)) for measurement in run.prices]
    else:
        run.prices = [measurement for measurement in logged.values() if measurement]
        told = run.record.get("price")
        if run.prices and isinstance(told, dict):
            run.prices[-1] = run.prices[-1].told(told, METRICS)


def _read_log(run: Run) -> None:
    file = run.folder / LOG
    if not file.is_file():
        run.notes.append(f"{LOG} is missing: there are no curves over steps.")
        return
    try:
        entries = read_log(file)
        resumed = re.findall(rb'^\{"resumed_from": ?(\d+)\}', file.read_bytes(), re.MULTILINE)
    except OSError as error:
        run.notes.append(f"{LOG} cannot be read ({error}): there are no curves over steps.")
        return
    if resumed:
        steps = ", ".join(step.decode() for step in resumed)
        run.notes.append(f"The run was resumed from step {steps}; curves show each step once, as last run.")
    finished, not_finite = False, 0
    wrong = [fault for entry in entries for fault in schema.faults(entry, finite=False)]
    if wrong:
        run.notes.append(f"{LOG} holds {len(wrong)} numbers that cannot be, which are left out. The first: {wrong[0]}.")
        entries = [schema.sound(entry, finite=False) for entry in entries]
    sets = sorted({match[1] for entry in entries for key in entry if (match := _EVALUATION_KEY.match(key))})
    chosen = "eval" if not sets or "eval" in sets else sets[0]
    if len(sets) > 1:
        run.notes.append(f"Evaluated on {', '.join(sets)}; this report shows {chosen}. The others are in {LOG}.")
    for entry in entries:
        step = entry["step"]
        finished |= "train_runtime" in entry
        numbers = {key: value for key, got in entry.items() if (value := number(got)) is not None}
        not_finite += any(not math.isfinite(value) for value in numbers.values())
        if any(key.startswith("cpo/") for key in numbers):
            run.training[step] = numbers
        if any(key.startswith(f"{chosen}_cpo/") for key in numbers):
            run.evaluations[step] = _evaluation(numbers, chosen, step)
    run.training, run.evaluations = dict(sorted(run.training.items())), dict(sorted(run.evaluations.items()))
    if not_finite:
        run.notes.append(f"{not_finite} lines of {LOG} hold NaN or infinite numbers: curves have gaps there.")
    if not finished:
        last = max([*run.training, *run.evaluations], default=None)
        run.notes.append(
            f"{LOG} holds no training."
            if last is None
            else f"{LOG} ends at step {last} without the end of training: the run was stopped, or is still running."
        )


def _evaluation(values: dict, prefix: str, step: int | None, pairs=None) -> Evaluation:
    start = f"{prefix}_"
    numbers = {
        key[len(start) :]: got for key, value in values.items() if key.startswith(start) and (got := number(value)) is not None
    }
    pairs = number(numbers.get("cpo/pairs", pairs))
    return Evaluation(step, numbers, int(pairs) if pairs and math.isfinite(pairs) and pairs >= 1 else None)


def _before_and_after(run: Run) -> None:
    """Finds the two evaluations that the table compares: those in metrics.json, else the log's first (at step 0) and last."""
    count = run.record.get("held_out_pairs", len(run.held_out) if run.held_out else None)
    found = {}
    for name in ("before", "after"):
        values = run.record.get(name)
        if isinstance(values, dict):
            sets = sorted({match[1] for key in values if (match := _EVALUATION_KEY.match(str(key)))})
            prefix = "eval" if not sets or "eval" in sets else sets[0]
            step = values.get("step")
            found[name] = _evaluation(values, prefix, step if isinstance(step, int) else None, count)
    steps = list(run.evaluations)
    run.before, run.after = found.get("before"), found.get("after")
    if run.before is None and steps and steps[0] == 0:
        run.before = run.evaluations[0]
    if run.after is None and steps and steps[-1] > 0:
        run.after = run.evaluations[steps[-1]]
        run.notes.append(f"“After” is the last evaluation in {LOG}, at step {steps[-1]}, because {METRICS} has no final one.")
    for name, evaluation in (("before", run.before), ("after", run.after)):
        if evaluation is None:
            run.notes.append(f"There is no evaluation {name} training.")
    # A run evaluates one set of pairs, so the number of pairs in one evaluation holds for the other.
    known = next((e.pairs for e in (run.after, run.before) if e and e.pairs), None)
    if run.before and not run.before.pairs:
        run.before = Evaluation(run.before.step, run.before.values, known)
    if run.after and not run.after.pairs:
        run.after = Evaluation(run.after.step, run.after.values, known)


def _cross_check(run: Run) -> None:
    """Checks pairs.json against the final metrics: the same weights on the same pairs must give the same fractions."""
    if run.held_out is None or run.after is None:
        return
    pairs, got = len(run.held_out), float(np.mean(run.held_out.gap > 0))
    if run.after.pairs not in (None, run.pairs_in_file):
        run.notes.append(f"{PAIRS} holds {run.pairs_in_file} pairs; the final evaluation was over {run.after.pairs}.")
        return
    said = run.after.values.get("cpo/prefers_chosen")
    # Pairs left out may be on either side, and one pair may lie at 0 up to rounding.
    if said is not None and abs(said - got) > (1.5 + run.pairs_in_file - pairs) / run.pairs_in_file:
        run.notes.append(
            f"{PAIRS} and the final metrics disagree: {100 * got:.1f} % of its pairs prefer the chosen answer, the metrics "
            f"say {100 * said:.1f} %. Pictures of single pairs may show another step of the run."
        )


def of_runs(runs: list[Run]) -> list[str]:
    """Notes on comparing the runs with each other."""
    notes = []

    def listed(values) -> str:
        return "; ".join(f"{run.letter}: {value}" for run, value in zip(runs, values, strict=True))

    units = [run.unit if run.reduction else "not known" for run in runs]
    if len(set(units)) > 1:
        notes.append(f"Gaps may be in different units ({listed(units)}): compare fractions, not nats.")
    gammas = ["not known" if run.gamma is None else f"{run.gamma:g}" for run in runs]
    if len(set(gammas)) > 1:
        notes.append(f"γ differs ({listed(gammas)}): violations (δ < γ) count different things.")
    starts = [
        None if run.after is None else (run.after.pairs, round(run.after.values.get("cpo/ref_gap", math.nan), 3))
        for run in runs
    ]
    known = [start for start in starts if start is not None and start[1] == start[1]]
    if len(set(known)) > 1 and len(set(units)) == 1:
        notes.append(
            "The runs were evaluated on different pairs or against different references: do not compare their numbers."
        )
    seeds = [run.record.get("seed", "not known") for run in runs]
    if len(runs) > 1:
        notes.append(f"One seed per run ({listed(seeds)}): differences between runs include chance.")
    return notes
