"""Draws two runs against each other on the same held-out pairs, each pair a point."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .pair_pictures import limits, outside
from .paired import comparisons, points, sentence
from .run import Run
from .style import COLOURS, LINES, QUIET, legend, panels, plain_ticks, run_title


def pair_by_pair(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws each pair's gap in the first run (across) and in another (up); one panel per other run. And notes."""
    found = comparisons(runs)
    figure, axes = panels(len(found), heights=(5.6, 4.9, 4.3))
    notes = [sentence(comparison) for comparison in found]
    gaps = [comparison.run.pairs.gap for comparison in found]
    across, up = limits(found[0].other.pairs.gap, include=(0.0,)), limits(*gaps, include=(0.0,))
    for panel, comparison in zip(axes, found, strict=True):
        run, other = comparison.run, comparison.other
        x, y = other.pairs.gap, run.pairs.gap
        panel.set(xlim=across, ylim=up)
        ends = max(across[0], up[0]), min(across[1], up[1])
        if ends[0] < ends[1]:
            panel.plot(ends, ends, color=QUIET, linestyle=LINES[1], linewidth=1.2, zorder=1)
        panel.axhline(0, color="#222222", linewidth=0.9, zorder=1)
        panel.axvline(0, color="#222222", linewidth=0.9, zorder=1)
        for mask, (_, colour, marker) in zip(_kinds(x, y), _KINDS, strict=True):
            panel.scatter(
                np.clip(x[mask], *across),
                np.clip(y[mask], *up),
                s=min(30, max(8, 500 / math.sqrt(len(x)))),
                marker=marker,
                color=colour,
                alpha=0.65,
                linewidths=1.0 if marker == "x" else 0.0,
                zorder=3,
            )
        plain_ticks(panel)
        panel.set_title(f"{run_title(run)}\n{points(comparison.prefers)} against {other.letter}")
        panel.set_xlabel(f"gap δ_θ in {other.letter} ({other.unit})")
        panel.set_ylabel(f"gap δ_θ in {run.letter} ({run.unit})")
        beyond = outside(x, y, across, up)
        if beyond:
            notes.append(f"{run.letter}: {beyond} of {len(x)} pairs lie outside the axes and are drawn at their edge.")
    handles = [Line2D([], [], color=QUIET, linestyle=LINES[1], label="the same gap in both")]
    handles += [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label.format(found[0].other.letter))
        for label, colour, marker in _KINDS
    ]
    legend(figure, handles, columns=3)
    return figure, notes


#: Who prefers the chosen answer of a pair: label, colour, marker.
_KINDS = (
    ("both prefer chosen", COLOURS[0], "o"),
    ("only the run of the panel", COLOURS[2], "^"),
    ("only {}", COLOURS[1], "v"),
    ("neither", "#000000", "x"),
)


def _kinds(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Masks in the order of `_KINDS`: across is the first run."""
    return (x > 0) & (y > 0), (x <= 0) & (y > 0), (x > 0) & (y <= 0), (x <= 0) & (y <= 0)
