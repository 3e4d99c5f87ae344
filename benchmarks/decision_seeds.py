"""
Compares arms of benchmarks/decisions.py over several seeds, at equal KL on general prompts.

    python -m benchmarks.decision_seeds FILE... [--kl 0.02 0.04 0.06]

The files are what `python -m benchmarks.decisions run` wrote, by one process or several; one of them holds the arm "start".
Each run is a curve over its measured steps, from the start at KL 0. A share at a level of KL lies on the straight line
between the two neighbouring measurements where the curve first reaches that level; no step is chosen. Where a run does not
reach a level, the other seeds count alone, and the table says how many. ± is half a 95 % interval of the mean (Student's t
over seeds); it does not hold the chance of which messages were held out, which are the same for all runs.

Differences are of the same seeds: clip less DPO with all other settings alike.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .decisions import BASE, at_level, name_of
from .demo_seeds import interval

LEVELS = (0.02, 0.04, 0.06)
#: What is compared, and how a table calls it.
SHARES = {"preferred": "preferred", "right": "likeliest of six", "answered": "greedy answer right"}
#: Settings that clip and DPO must have alike to be compared.
ALIKE = tuple(BASE)

#: Of each arm, by its name: its settings, and by seed its records.
Arms = dict[str, tuple[dict[str, Any], dict[int, list[dict[str, Any]]]]]


def grouped(records: Sequence[dict[str, Any]]) -> Arms:
    """Records by arm and seed, in the order of their steps, each after the record of the start.

    Raises:
        ValueError: the start is missing, an arm was measured twice at a step, or an arm's rate falls, so that its
            measurements are no curve.
    """
    start = next((record for record in records if record["step"] == 0), None)
    if start is None:
        raise ValueError("No record of the start: run the arm start too.")
    arms: Arms = {}
    for record in sorted(records, key=lambda each: each["step"]):
        if not record["step"]:
            continue
        name, seed = name_of(record), record["seed"]
        if record["settings"].get("schedule", "constant") != "constant":
            raise ValueError(f"{name}: only the last step of a rate that falls counts, which is no curve.")
        curve = arms.setdefault(name, (record["settings"], {}))[1].setdefault(seed, [start])
        if curve[-1]["step"] == record["step"]:
            raise ValueError(f"{name}, seed {seed}, step {record['step']} is there twice.")
        curve.append(record)
    return arms


def named(runs: dict[int, list[dict[str, Any]]]) -> str:
    """An arm's name alone."""
    return next(iter(runs.values()))[-1]["arm"]


def shares_at(runs: dict[int, list[dict[str, Any]]], level: float, share: str) -> dict[int, float]:
    """Percent at a level of KL, by seed, of the runs that reach it."""
    found = {}
    for seed, run in sorted(runs.items()):
        value = at_level([(each["kl_general"]["value"], each["decisions"][share]["share"]) for each in run], level)
        if value is not None:
            found[seed] = 100 * value
    return found


def apart(arms: Arms) -> list[str]:
    """The settings, beside the constraint's own, in which arms differ."""
    return [key for key in ALIKE if len({str(settings.get(key)) for settings, _ in arms.values()}) > 1]


def told(values: Sequence[float], runs: int, sign: str = "") -> str:
    """Mean ± half its interval, and how many of the runs it is of where not of all."""
    some = "" if len(values) == runs else f" ({len(values)} of {runs})"
    if len(values) < 2:
        return f"–{some}"
    middle, half = interval(list(values))
    return f"{middle:{sign}.1f} ± {half:.1f}{some}"


def seeds_table(records: Sequence[dict[str, Any]], levels: Sequence[float] = LEVELS) -> str:
    """Markdown: each arm at each level, then clip less DPO, their mean and seed by seed."""
    arms = grouped(records)
    differ = apart(arms)
    where = ["settings"] if differ else []

    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    def shown(settings: dict[str, Any]) -> list[str]:
        return [", ".join(f"{key} {settings.get(key)}" for key in differ)] if differ else []

    (some, _), *_ = arms.values()
    lines = [f"All arms: {', '.join(f'{key} {some.get(key)}' for key in ALIKE if key not in differ)}.", ""]
    lines += [row("arm", *where, "seeds", "KL", *SHARES.values()), "|---" * (3 + len(where) + len(SHARES)) + "|"]
    for _, (settings, runs) in sorted(arms.items()):
        for level in levels:
            cells = [told(list(shares_at(runs, level, share).values()), len(runs)) for share in SHARES]
            lines.append(row(named(runs), *shown(settings), str(len(runs)), f"{level:g}", *cells))
    lines += ["", row("difference", *where, "KL", *SHARES.values()), "|---" * (2 + len(where) + len(SHARES)) + "|"]
    for _, (settings, runs) in sorted(arms.items()):
        for _, (others, other_runs) in sorted(arms.items()):
            kinds = settings["constraint"], others["constraint"]
            if kinds != ("clip", "none") or any(settings.get(key) != others.get(key) for key in ALIKE):
                continue
            both = sorted(set(runs) & set(other_runs))
            for level in levels:
                cells = []
                for share in SHARES:
                    ours, theirs = shares_at(runs, level, share), shares_at(other_runs, level, share)
                    gains = {seed: ours[seed] - theirs[seed] for seed in both if seed in ours and seed in theirs}
                    each = ", ".join(f"{seed}: {gain:+.0f}" for seed, gain in gains.items())
                    cells.append(f"{told(list(gains.values()), len(both), '+')} [{each}]")
                lines.append(row(f"{named(runs)} less {named(other_runs)}", *shown(settings), f"{level:g}", *cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decision_seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--kl", type=float, nargs="+", default=LEVELS, help="levels of KL, nats a token")
    options = parser.parse_args()
    records = [record for file in options.files for record in json.loads(file.read_text(encoding="utf-8"))]
    print(seeds_table(records, options.kl))


if __name__ == "__main__":
    main()
