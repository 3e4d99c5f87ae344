"""Every table of docs/evidence.md, from the records alone.

Arms are compared at the same KL: each is given the best score on its curve at no more than that KL, between measured points
too, and the start's where it has nothing better. Differences are taken seed by seed (the same reference, pairs and order), with
Student's t over seeds at 95 %, Bonferroni over the methods of a table.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: KL at which arms are compared: nats a prompt (decisions, larger), nats an answer (sampled, real).
LEVELS = {"decisions": (0.3, 1.0, 2.0), "larger": (1.0, 2.0, 5.0), "sampled": (1.0, 2.0, 4.0), "real": (1.0, 3.0, 6.0)}
SCORE = {"decisions": "right", "larger": "right", "sampled": "reward", "real": "preferred"}
#: Scores that are shares.
SHARES = ("right", "preferred")
BASELINE = "dpo"
Run = dict[str, Any]


def read(file: Path) -> list[Run]:
    """The runs of a file, one a line; none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def method_of(arm: str) -> str:
    """An arm's method: its name without β."""
    return " ".join(word for word in arm.split() if not word.replace(".", "", 1).isdigit())


def starts(runs: Iterable[Run]) -> dict[tuple[str, int], Run]:
    return {(run["variant"], run["seed"]): run for run in runs if run["arm"] == "start"}


def within(run: Run, start: Run, level: float, part: str, score: str) -> float:
    """The best score on a run's curve at no more than this KL."""
    return max(y for _, y in curve_within(run, start, level, part, score))


def curve_within(run: Run, start: Run, level: float, part: str, score: str) -> list[tuple[float, float]]:
    """A run's curve from the start to where it passes this KL."""
    points = [(0.0, start["curve"][0][part][score])]
    for each in run["curve"]:
        x0, y0 = points[-1]
        x1, y1 = max(0.0, each[part]["kl"]), each[part][score]
        if x1 > level:
            points.append((level, y0 + (y1 - y0) * (level - x0) / (x1 - x0)))
            break
        points.append((x1, y1))
    return points


def tuned_score(run: Run, start: Run) -> float:
    """What tuning goes by: the mean over the levels of KL, on the validation part."""
    experiment = run["experiment"]
    found = [within(run, start, level, "validation", SCORE[experiment]) for level in LEVELS[experiment]]
    return sum(found) / len(found)


def best_arms(runs: list[Run], experiment: str, variant: str) -> dict[str, str]:
    """The best arm of each method in the variant's tuning runs."""
    begun, best = starts(runs), {}
    for run in _tuning(runs, variant):
        score = tuned_score(run, begun[run["variant"], 0])
        if score > best.get(method_of(run["arm"]), ("", -math.inf))[1]:
            best[method_of(run["arm"])] = (run["arm"], score)
    return {method: arm for method, (arm, _) in best.items()}


def _tuning(runs: list[Run], variant: str) -> list[Run]:
    """The runs with seed 0 of a variant; where it has none, of the first variant."""
    found = [run for run in runs if run["seed"] == 0 and run["arm"] != "start"]
    own = [run for run in found if run["variant"] == variant]
    return own or [run for run in found if run["variant"] == runs[0]["variant"]]


def told(run: Run) -> str:
    """A run in a line."""
    score = SCORE.get(run["experiment"], "in_u")
    points = [(each["step"], each.get("test", each.get("validation"))) for each in run["curve"]]
    shown = "  ".join(f"{step}: {part[score]:.3f} at {part['kl']:.3f}" for step, part in points)
    return f"{run['experiment']}, {run['variant']}, {run['arm']}, seed {run['seed']}, {run['seconds']} s:  {shown}"


def interval(values: list[float], comparisons: int = 1) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over seeds by Student's t, at the joint level of so many comparisons.

    The half is NaN for fewer than three seeds: two differ by chance by nearly nothing, or by much.
    """
    from scipy.stats import t

    mean = sum(values) / len(values)
    if len(values) < 3:
        return mean, math.nan
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, float(t.ppf(1 - 0.025 / comparisons, len(values) - 1)) * spread / math.sqrt(len(values))


def tuning(runs: list[Run], experiment: str, variant: str) -> str:
    """Every arm of the tuning, on the validation part, one seed."""
    begun, levels = starts(runs), LEVELS[experiment]
    lines = _head("arm", *(f"at KL {level:g}" for level in levels), "mean")
    best = set(best_arms(runs, experiment, variant).values())
    for run in _tuning(runs, variant):
        start = begun[run["variant"], 0]
        cells = [within(run, start, level, "validation", SCORE[experiment]) for level in levels]
        shown = [_score(experiment, cell) for cell in (*cells, sum(cells) / len(cells))]
        lines.append(_row(f"**{run['arm']}**" if run["arm"] in best else run["arm"], *shown))
    return "\n".join(lines)


def final(runs: list[Run], experiment: str, variant: str) -> str:
    """Each method's best arm on the test part, and its difference to DPO's, at equal KL."""
    begun, levels, score = starts(runs), LEVELS[experiment], SCORE[experiment]
    found = _finals(runs, variant)
    baseline = next((arm for arm in found if method_of(arm) == BASELINE), None)
    lines = _head("arm", "seeds", *(f"at KL {level:g}" for level in levels), *(f"less DPO at {level:g}" for level in levels))
    at: dict[str, dict[float, dict[int, float]]] = {
        arm: {
            level: {run["seed"]: within(run, begun[variant, run["seed"]], level, "test", score) for run in own}
            for level in levels
        }
        for arm, own in found.items()
    }
    for arm, by_level in at.items():
        cells = [_with_half(experiment, *interval(list(by_seed.values()))) for by_seed in by_level.values()]
        for level in levels:
            if baseline is None or arm == baseline:
                cells.append("–")
                continue
            shared = [seed for seed in by_level[level] if seed in at[baseline][level]]
            differences = [by_level[level][seed] - at[baseline][level][seed] for seed in shared]
            cells.append(_with_half(experiment, *interval(differences, len(at) - 1), signed=True))
        lines.append(_row(arm, str(len(found[arm])), *cells))
    return "\n".join(lines)


def _finals(runs: list[Run], variant: str) -> dict[str, list[Run]]:
    """Runs by arm, those of tuning left out, in the order in which they were made."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run["variant"] == variant and run["seed"] != 0 and run["arm"] != "start":
            found.setdefault(run["arm"], []).append(run)
    return found


def ends(runs: list[Run], experiment: str, variant: str, columns: dict[str, str], part: str = "test") -> str:
    """Each arm at its last step, with all that was measured, mean over seeds: of the final runs, or on validation of tuning."""
    lines = _head("arm", "steps", *columns.values())
    begun = [run for run in runs if run["arm"] == "start" and run["variant"] == variant]
    begun = [run for run in begun if (run["seed"] == 0) == (part == "validation")]
    ended = _finals(runs, variant) if part == "test" else {run["arm"]: [run] for run in _tuning(runs, variant)}
    for arm, own in {"start": begun, **ended}.items():
        cells = []
        for name in columns:
            lasts = [run["curve"][-1] for run in own]
            cells.append(f"{sum(last[part].get(name, last.get(name)) for last in lasts) / len(lasts):.3f}")
        lines.append(_row(arm, str(own[0]["curve"][-1]["step"]), *cells))
    return "\n".join(lines)


def misaligned(runs: list[Run]) -> str:
    """Share in U and what came with it, along steps, mean and half interval over seeds."""
    names = {"in_u": "in U, %", "preferred": "preferred, %", "held_out": "held out, %"}
    lines = _head("R", "arm", "steps", *names.values(), "KL, nats an answer")
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["variant"], run["arm"]), []).append(run)
    for (variant, arm), own in sorted(groups.items(), key=lambda each: (each[0][0], each[0][1] != "start")):
        for at, point in enumerate(own[0]["curve"]):
            tests = [run["curve"][at]["test"] for run in own]
            cells = [_with_half("decisions", *interval([test[name] for test in tests])) for name in names]
            kl, half = interval([test["kl"] for test in tests])
            shown = f"{kl:.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
            lines.append(_row(variant.split()[1], arm, str(point["step"]), *cells, shown))
    return "\n".join(lines)


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _score(experiment: str, value: float) -> str:
    return f"{100 * value:.1f} %" if SCORE[experiment] in SHARES else f"{value:.3f}"


def _with_half(experiment: str, mean: float, half: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if SCORE[experiment] in SHARES:
        return f"{100 * mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def everything(folder: Path) -> str:
    """Every table, in Markdown."""
    return "\n\n".join(f"<!-- {name} -->\n{table}" for name, table in named(folder).items())


def named(folder: Path) -> dict[str, str]:
    """The tables of the docs by name."""
    found = {}
    for experiment in LEVELS:
        runs = read(folder / f"{experiment}.jsonl")
        if not runs:
            continue
        for variant in dict.fromkeys(run["variant"] for run in runs):
            if any(run["variant"] == variant for run in _tuning(runs, variant)):
                named = f"{experiment}: tuning" if variant == runs[0]["variant"] else f"{experiment}: {variant}, tuning"
                found[named] = tuning(runs, experiment, variant)
                found[f"{named}, at the end"] = ends(runs, experiment, variant, COLUMNS[experiment], "validation")
            if _finals(runs, variant):
                found[f"{experiment}: {variant}"] = final(runs, experiment, variant)
                found[f"{experiment}: {variant}, at the end"] = ends(runs, experiment, variant, COLUMNS[experiment])
    if runs := read(folder / "misaligned.jsonl"):
        found["misaligned"] = misaligned(runs)
    return found


MARK = re.compile(r"<!-- table: (?P<name>.+?) -->\n(?:\|.*\n)*")


def filled(text: str, folder: Path) -> str:
    """A page with the tables that it names: behind each `<!-- table: NAME -->`. Raises `KeyError` for an unknown name."""
    tables = named(folder)
    return MARK.sub(lambda found: f"<!-- table: {found['name']} -->\n{tables[found['name']]}\n", text)


COLUMNS = {
    "decisions": {
        "right": "right",
        "right_slice": "right on the slice",
        "greedy_right": "greedy right",
        "p_right": "P(right)",
        "kl": "KL, nats a prompt",
        "kl_general": "KL elsewhere, nats a token",
    },
    "larger": {
        "right": "right",
        "right_slice": "right where changed",
        "right_elsewhere": "right elsewhere",
        "greedy_right": "greedy right",
        "p_right": "P(right)",
        "kl": "KL, nats a prompt",
        "kl_general": "KL elsewhere, nats a token",
    },
    "real": {
        "preferred": "preferred, sums",
        "preferred_means": "preferred, means",
        "kl": "KL, nats an answer",
        "kl_token": "KL, nats a token",
        "tokens": "tokens an answer",
    },
    "sampled": {
        "reward": "reward",
        "kl": "KL, nats an answer",
        "tokens": "tokens an answer",
        "preferred": "held-out pairs preferred",
    },
}
