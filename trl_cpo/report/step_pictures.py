"""Draws the pictures over optimizer steps: fractions of pairs, loss and gap, the multiplier, displacement."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import table
from .run import Run, by_unit
from .style import QUIET, canvas, columns_of, legend, plain_ticks, run_style, run_title

#: With more logs than this, the training curve is a running mean, and the logs themselves are drawn faintly.
MOST_LOGS = 60
_FEW = 4
#: The fractions drawn over steps: metric and title.
FRACTIONS = (
    ("in_undesirable_region", "In U (δ_ref < δ_θ < 0)"),
    ("violation_rate", "Violations (δ_θ < γ)"),
    ("prefers_chosen", "Prefers chosen (δ_θ > 0)"),
)


def series(run: Run, metric: str, of_training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a logged metric, (k,) each; NaN where a value is not finite or beyond 1e30."""
    found = run.training if of_training else {step: evaluation.values for step, evaluation in run.evaluations.items()}
    steps = [step for step, values in found.items() if metric in values]
    values = np.array([found[step][metric] for step in steps], dtype=float)
    # Beyond this no axis can be drawn; the run has diverged, and its log shows it.
    values[~np.isfinite(values) | (np.abs(values) > 1e30)] = math.nan
    return np.array(steps, dtype=float), values


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a window around each value, (k,): `window` values, fewer at the ends, NaN left out."""
    half = window // 2
    around = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return np.array([np.nanmean(part) if np.isfinite(part).any() else math.nan for part in around])


def _window(logs: int) -> int:
    return 1 if logs <= MOST_LOGS else 2 * (logs // 40) + 1


def intervals(run: Run, metric: str) -> list[tuple[int, tuple[float, float]]]:
    """The step and the exact 95 % interval of a fraction of each evaluation that says of how many pairs it is."""
    cells = ((step, table.cell(evaluation, metric, True)) for step, evaluation in run.evaluations.items())
    return [(step, cell.interval) for step, cell in cells if cell and cell.interval]


def _draw(axes: Axes, runs: list[Run], metric: str, is_fraction: bool = False) -> bool:
    """Draws one metric of the runs, training curves and evaluations; returns whether there was anything to draw.

    A fraction is drawn in %, its evaluations with their intervals.
    """
    drawn, scale = False, 100.0 if is_fraction else 1.0
    # With many runs, training noise would hide the markers.
    line: dict[str, Any] = {"linewidth": 1.3} if len(runs) <= _FEW else {"linewidth": 0.9, "alpha": 0.45}
    for run in runs:
        style = run_style(run)
        steps, values = series(run, metric, of_training=True)
        if np.isfinite(values).any():
            drawn, window = True, _window(len(values))
            if window > 1:
                axes.plot(steps, scale * values, color=style["color"], linewidth=0.6, alpha=0.3)
            alone: dict[str, Any] = {"marker": ".", "markersize": 5} if np.isfinite(values).sum() == 1 else {}
            axes.plot(
                steps,
                scale * running_mean(values, window),
                color=style["color"],
                linestyle=style["linestyle"],
                **line,
                **alone,
            )
        steps, values = series(run, metric, of_training=False)
        if np.isfinite(values).any():
            drawn = True
            # Two evaluations, start and end, do not make a curve.
            joined = style["linestyle"] if len(steps) > 2 else ""
            axes.plot(
                steps,
                scale * values,
                **{**style, "linestyle": joined},
                linewidth=0.7,
                markersize=7.5,
                zorder=4,
                clip_on=False,
            )
            for step, (low, high) in intervals(run, metric) if is_fraction else ():
                axes.vlines(step, scale * low, scale * high, **_bar(style["color"], len(runs)))
    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=QUIET)
    return drawn


def _bar(colour: str, runs: int) -> dict[str, Any]:
    """How an interval is drawn: the fainter, the more there are at a step."""
    return {"color": colour, "linewidth": 1.0, "alpha": 0.5 if runs <= _FEW else 0.25}


def _notes(runs: list[Run]) -> list[str]:
    smoothed = [f"{run.letter}: {_window(len(run.training))} logs" for run in runs if _window(len(run.training)) > 1]
    return [f"Training curves are running means; the logs themselves are faint ({', '.join(smoothed)})."] if smoothed else []


def _frame(runs: list[Run], columns: int, rows: int = 1, more: Sequence[Artist] = ()) -> tuple[Figure, list[list[Axes]]]:
    """A figure with rows of panels and a shared legend, `more` at its end; panels that do not fit side by side are stacked."""
    across = columns_of(columns)
    down = rows * columns // across
    figure = canvas(0.5 + 3.4 * down + 0.22 * max(0, (len(runs) + 2) // 3 - 1))
    axes = [[figure.add_subplot(down, across, row * columns + place + 1) for place in range(columns)] for row in range(rows)]
    handles = [Line2D([], [], **run_style(run), linewidth=1.5, markersize=7, label=run_title(run)) for run in runs]
    handles += [
        Line2D([], [], color=QUIET, linewidth=1.3, label="line: training pairs, mean since the last log"),
        Line2D(
            [],
            [],
            color=QUIET,
            marker="o",
            markersize=7,
            markeredgecolor="white",
            linestyle="",
            label="markers: held-out pairs",
        ),
    ]
    legend(figure, [*handles, *more], columns=3)
    return figure, axes


def _finish(axes: Axes, runs: list[Run], title: str, unit: str) -> None:
    plain_ticks(axes)
    last = max((step for run in runs for step in (*run.training, *run.evaluations)), default=0)
    axes.set(xlim=(-0.02 * last, 1.02 * last) if last else (-1, 1))
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)


def fractions_over_steps(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws U, violations and preferences over steps, in % of pairs, all runs in the same axes. And notes."""
    known = any(intervals(run, f"cpo/{metric}") for run in runs for metric, _ in FRACTIONS)
    bars = Line2D([], [], color=QUIET, marker="|", markersize=10, linestyle="", label="bars: exact 95 % intervals")
    figure, (row,) = _frame(runs, len(FRACTIONS), more=[bars] if known else [])
    for axes, (metric, title) in zip(row, FRACTIONS, strict=True):
        _draw(axes, runs, f"cpo/{metric}", is_fraction=True)
        _finish(axes, runs, title, "pairs (%)")
        axes.set_ylim(-3, 103)
        axes.set_yticks(range(0, 101, 20))
    return figure, _notes(runs)


def loss_and_gap(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws the loss, and the mean gap beside the held-out reference's; one row per unit. And notes."""
    groups = by_unit(runs)
    figure, rows = _frame(runs, 2, len(groups))
    for (left, right), group in zip(rows, groups, strict=True):
        _draw(left, group, "loss")
        _finish(left, group, "Loss", "loss (nats)")
        _draw(right, group, "cpo/gap")
        references: dict[float, str] = {}
        for run in group:
            values = series(run, "cpo/ref_gap", of_training=False)[1]
            if np.isfinite(values).any():
                references.setdefault(round(float(values[np.isfinite(values)][-1]), 3), run_style(run)["color"])
        for value, colour in references.items():
            right.axhline(value, color=QUIET if len(references) == 1 else colour, linestyle=(0, (2, 2)), linewidth=1.2)
        right.axhline(0, color="#222222", linewidth=1.0)
        named = ", held-out δ_ref dotted" if references else ""
        _finish(right, group, f"Mean gap δ_θ{named}", f"gap ({group[0].unit})")
    return figure, _notes(runs)


def has_multiplier(run: Run) -> bool:
    """Whether the run logged a multiplier."""
    return any("cpo/lambda" in values for values in run.training.values())


def multiplier(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws λ, the mean violation and the slack over steps; one row per unit. And notes."""
    groups = [group for group in by_unit(runs) if any(map(has_multiplier, group))]
    runs = [run for group in groups for run in group]
    figure, rows = _frame(runs, 3, len(groups))
    for (left, middle, right), group in zip(rows, groups, strict=True):
        _draw(left, group, "cpo/lambda")
        _finish(left, group, "Multiplier λ", "λ (1/nats)")
        _draw(middle, group, "cpo/violation")
        _finish(middle, group, "Mean violation max(0, γ − δ_θ)", f"violation ({group[0].unit})")
        _draw(right, group, "cpo/slack")
        signals = {str(run.settings.get("dual_signal", "not known")) for run in group if has_multiplier(run)}
        known = {"violation_rate": "fraction of pairs", "violation": group[0].unit}
        unit = known.get(signals.pop(), "unit of ε") if len(signals) == 1 else "unit of ε"
        right.axhline(0, color="#222222", linewidth=1.0)
        _finish(right, group, "Slack ε − violation", f"slack ({unit})")
    return figure, _notes(runs)


def displacement_over_steps(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws how far chosen and rejected log-probabilities moved from the reference's, over steps. And notes."""
    groups = by_unit(runs)
    figure, rows = _frame(runs, 2, len(groups))
    for both, group in zip(rows, groups, strict=True):
        both[1].sharey(both[0])
        for axes, side in zip(both, ("chosen", "rejected"), strict=True):
            _draw(axes, group, f"cpo/{side}_logps_shift")
            axes.axhline(0, color="#222222", linewidth=1.0)
            _finish(axes, group, f"{side.capitalize()} log-prob moved by", f"s_θ − s_ref ({group[0].unit})")
    return figure, _notes(runs)
