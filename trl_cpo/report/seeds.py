"""Runs of one setting with several seeds, and the picture of them as bands."""

import json

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .run import Run
from .step_pictures import FRACTIONS, series
from .style import QUIET, canvas, columns_of, drawable, legend, plain_ticks, run_style
from .table import BESIDE_THE_POINT

#: Settings in which seeds of one setting may differ.
_OF_A_SEED = BESIDE_THE_POINT | {"seed", "data_seed"}


def _setting(run: Run) -> str | None:
    """All that a run was trained with but its seed, as text; None if not known."""
    if not run.record or not run.settings:
        return None
    pairs = run.record.get("pairs")
    data = pairs.get("dataset_name") if isinstance(pairs, dict) else None
    told = {str(name): value for name, value in run.settings.items() if name not in _OF_A_SEED}
    try:
        return json.dumps([told, run.record.get("model"), data], sort_keys=True, default=str)
    except (ValueError, RecursionError):
        return None


def groups(runs: list[Run]) -> list[list[Run]]:
    """The runs of each setting of which there are at least two, each with a seed of its own."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        setting = _setting(run)
        if setting is not None:
            found.setdefault(setting, []).append(run)
    return [group for group in found.values() if len({_seed(run) for run in group}) == len(group) > 1]


def _seed(run: Run) -> str:
    return repr(run.record.get("seed", run.settings.get("seed")))


def drawn_groups(runs: list[Run]) -> list[list[Run]]:
    """The groups whose runs were all evaluated at one step at least."""
    return [group for group in groups(runs) if len(_bands(group, FRACTIONS[-1][0])[0])]


def with_seeds(runs: list[Run]) -> list[Run]:
    """The runs that are in such a group."""
    among = [run for group in drawn_groups(runs) for run in group]
    return [run for run in runs if run in among]


def name(group: list[Run]) -> str:
    """The runs of a group and their constraint."""
    return drawable(f"{', '.join(run.letter for run in group)}  {group[0].constraint}")


def _bands(group: list[Run], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which all runs of a group evaluated a fraction, (k,), and it in %, (runs, k)."""
    curves = [dict(zip(*map(np.ndarray.tolist, series(run, f"cpo/{metric}", of_training=False)), strict=True)) for run in group]
    steps = [step for step in curves[0] if all(np.isfinite(curve.get(step, np.nan)) for curve in curves)]
    return np.array(steps), 100 * np.array([[curve[step] for step in steps] for curve in curves])


def seeds_as_bands(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws U, violations and preferences of the held-out pairs, in % of pairs, one band a setting. And notes."""
    found = drawn_groups(runs)
    across = columns_of(len(FRACTIONS))
    down = len(FRACTIONS) // across
    figure = canvas(0.5 + 3.4 * down + 0.22 * ((len(found) + 3) // 3))
    for place, (metric, title) in enumerate(FRACTIONS):
        axes = figure.add_subplot(down, across, place + 1)
        for group in found:
            look, (steps, values) = run_style(group[0]), _bands(group, metric)
            if not len(steps):
                continue
            # One step makes no band: a bar.
            axes.vlines(steps, values.min(axis=0), values.max(axis=0), color=look["color"], linewidth=1.0, alpha=0.6)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.2, linewidth=0)
            axes.plot(steps, values.mean(axis=0), **look, linewidth=1.5, markersize=6, zorder=4, clip_on=False)
        plain_ticks(axes)
        axes.set(ylim=(-3, 103), yticks=range(0, 101, 20))
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("pairs (%)")
    handles = [Line2D([], [], **run_style(group[0]), linewidth=1.5, markersize=7, label=name(group)) for group in found]
    handles += [Patch(color=QUIET, alpha=0.3, linewidth=0, label="band: lowest to highest seed; line: mean")]
    legend(figure, handles, columns=3)
    return figure, [f"{name(group)}: seeds {', '.join(map(_seed, group))}." for group in found]
