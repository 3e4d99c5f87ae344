"""Draws what the gain costs: held-out preference over the KL to the reference, one curve a run."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import table
from .run import Evaluation, Run
from .style import QUIET, legend, panels, plain_ticks, run_style, run_title

#: Where the KL is measured: the metric, and the panel's title.
_WHERE = (("cpo/kl", "KL on the pairs' prompts"), ("cpo/kl_general", "KL on general prompts"))
#: A KL is not negative; a sum of rounded terms may be, by this much.
_ROUNDING = 1e-3


def points(run: Run, metric: str = "cpo/kl") -> list[tuple[float, Evaluation]]:
    """The KL and the evaluation, in order of steps, of each evaluation that has a KL and a preference that can be drawn."""
    found = []
    for evaluation in run.evaluations.values():
        kl, prefers = evaluation.values.get(metric, math.nan), evaluation.values.get("cpo/prefers_chosen", math.nan)
        if -_ROUNDING <= kl <= 1e30 and 0.0 <= prefers <= 1.0:
            found.append((max(0.0, kl), evaluation))
    return found


def has_price(run: Run) -> bool:
    """Whether an evaluation after the start measured the KL on the pairs' prompts."""
    return any(evaluation.step for _, evaluation in points(run))


def gain_against_price(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws the held-out preference over the KL, a panel for the pairs' prompts and one for general prompts. And notes."""
    where = [(metric, title) for metric, title in _WHERE if any(points(run, metric) for run in runs)]
    figure, axes = panels(len(where))
    for panel, (metric, title) in zip(axes, where, strict=True):
        for run in runs:
            _curve(panel, run, points(run, metric))
        plain_ticks(panel)
        furthest = max(kl for run in runs for kl, _ in points(run, metric)) or 1.0
        panel.set(xlim=(-0.03 * furthest, 1.06 * furthest), ylim=(-3, 103), yticks=range(0, 101, 20))
        panel.set_title(title)
        panel.set_xlabel("KL to the reference (nats per token)")
        panel.set_ylabel("prefers chosen (% of held-out pairs)")
    handles = [Line2D([], [], **run_style(run), linewidth=1.5, markersize=7, label=run_title(run)) for run in runs]
    handles.append(Line2D([], [], color=QUIET, marker="o", markersize=10, linestyle="", label="large: the last evaluation"))
    if any(_interval(evaluation) for run in runs for _, evaluation in points(run)):
        handles.append(Line2D([], [], color=QUIET, marker="|", markersize=10, linestyle="", label="bars: exact 95 % intervals"))
    legend(figure, handles, columns=3)
    unknown = [
        f"{run.letter}: {len(run.evaluations) - len(points(run))} of {len(run.evaluations)} evaluations measured no KL."
        for run in runs
        if len(points(run)) < len(run.evaluations)
    ]
    return figure, unknown


def _interval(evaluation: Evaluation) -> tuple[float, float] | None:
    prefers = table.cell(evaluation, "cpo/prefers_chosen", True)
    return prefers.interval if prefers else None


def _curve(axes: Axes, run: Run, found: list[tuple[float, Evaluation]]) -> None:
    """Draws one run: a line through its evaluations in order of steps, their intervals, and a larger marker at the last."""
    if not found:
        return
    style = run_style(run)
    x = np.array([kl for kl, _ in found])
    y = np.array([100 * evaluation.values["cpo/prefers_chosen"] for _, evaluation in found])
    for across, (_, evaluation) in zip(x, found, strict=True):
        if interval := _interval(evaluation):
            axes.vlines(across, *(100 * end for end in interval), color=style["color"], linewidth=1.0, alpha=0.5)
    axes.plot(x, y, **style, linewidth=1.3, markersize=6, zorder=4, clip_on=False)
    axes.plot(x[-1:], y[-1:], **style, markersize=10, zorder=5, clip_on=False)
