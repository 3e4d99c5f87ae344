"""Draws the fractions of pairs by slice and by length, and preferences by sums beside those by means."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..gaps import in_undesirable_region
from ..intervals import clopper_pearson
from ..slices import slices_of
from .pair_pictures import limits, outside
from .run import HeldOut, Run
from .style import COLOURS, QUIET, canvas, columns_of, drawable, legend, panels, plain_ticks, run_style, run_title

#: The most slices of a column that are drawn; the rest is left out with a note.
MOST_SLICES = 8
_MEASURES = (("prefers chosen", "prefers"), ("in U", "in_u"))
_LONGER = "longer answer"
_LENGTH = "tokens in both"


def has_slices(run: Run) -> bool:
    """Whether the run's pairs can be parted, by length or by a column."""
    return run.held_out is not None and (run.held_out.tokens is not None or bool(run.held_out.slices))


def partings(pairs: HeldOut) -> dict[str, list[tuple[str, np.ndarray]]]:
    """The pairs in parts, by what they are parted by: name and mask (n,) of each part."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {}
    if pairs.tokens is not None:
        found[_LENGTH] = slices_of(pairs.tokens.sum(axis=1))
        chosen, rejected = pairs.tokens.T
        sides = (("chosen", chosen > rejected), ("the same", chosen == rejected), ("rejected", chosen < rejected))
        found[_LONGER] = [(name, mask) for name, mask in sides if mask.any()]
    return found | {name: slices_of(values) for name, values in pairs.slices.items() if name not in found}


def _measured(pairs: HeldOut, measure: str) -> np.ndarray:
    return pairs.gap > 0 if measure == "prefers" else in_undesirable_region(pairs.gap, pairs.ref_gap)


def fractions_by_slice(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws the share of pairs that prefer chosen and that lie in U, in each part of the pairs. And notes."""
    parted = {run.letter: partings(run.pairs) for run in runs}
    notes: list[str] = []
    by = list(dict.fromkeys(name for run in runs for name in parted[run.letter]))
    rows: list[list[str]] = []
    for name in by:
        parts = list(dict.fromkeys(part for run in runs for part, _ in parted[run.letter].get(name, [])))
        if len(parts) > MOST_SLICES:
            notes.append(f"By {name[:40]}: the first {MOST_SLICES} of {len(parts)} slices.")
        rows.append(parts[:MOST_SLICES])
    across = columns_of(2)
    # The height of a part grows with the runs in it.
    heights = [0.9 + len(parts) * (0.26 + 0.07 * len(runs)) for parts in rows]
    figure = canvas(0.5 + sum(heights) * (2 // across))
    grid = figure.add_gridspec(
        len(by) * 2 // across, across, height_ratios=[height for height in heights for _ in range(2 // across)]
    )
    for place, (name, parts) in enumerate(zip(by, rows, strict=True)):
        counts: dict[str, list[int]] = {}
        for column, (title, measure) in enumerate(_MEASURES):
            axes = figure.add_subplot(grid[place, column] if across == 2 else grid[2 * place + column, 0])
            for number, run in enumerate(runs):
                masks = dict(parted[run.letter].get(name, []))
                found = _measured(run.pairs, measure)
                for at, part in enumerate(parts):
                    trials = int(masks[part].sum()) if part in masks else 0
                    if not trials:
                        continue
                    counts.setdefault(part, []).append(trials)
                    successes = int(found[masks[part]].sum())
                    ends = clopper_pearson(successes, trials)
                    y = at + 0.7 * ((number + 0.5) / len(runs) - 0.5)
                    look = {**run_style(run), "linestyle": ""}
                    axes.hlines(y, *(100 * end for end in ends), color=look["color"], linewidth=1.2, alpha=0.6)
                    axes.plot([100 * successes / trials], [y], **look, markersize=6, zorder=4, clip_on=False)
            # The number of pairs is told where the runs agree on it.
            room = 16.0 if across == 2 else 11.0
            labels = [_label(part, counts[part], room) for part in parts]
            axes.set(xlim=(-3, 103), ylim=(len(parts) - 0.4, -0.6), xticks=range(0, 101, 20))
            axes.set_yticks(range(len(parts)), labels)
            axes.set_title(f"by {drawable(name, 11.0)}")
            axes.set_xlabel(f"{title} (% of pairs)")
            axes.set_ylabel("pairs")
    handles = [Line2D([], [], **{**run_style(run), "linestyle": ""}, markersize=7, label=run_title(run)) for run in runs]
    handles.append(Line2D([], [], color=QUIET, linewidth=1.2, label="bars: exact 95 % intervals"))
    legend(figure, handles, columns=3)
    return figure, notes


def _label(part: str, counts: list[int], room: float) -> str:
    """A part's name and its number of pairs where the runs agree on it."""
    number = f" ({counts[0]})" if len(set(counts)) == 1 else ""
    return drawable(part.replace(" to below ", " to <"), room) + number


def has_both_reductions(run: Run) -> bool:
    """Whether sums and means of the run's pairs are known."""
    weighted = run.settings.get("ld_alpha") is not None  # then sums are not those of all tokens
    return run.held_out is not None and run.held_out.tokens is not None and run.reduction is not None and not weighted


def both_gaps(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The gap by sums and by means of each pair, (n,) each, "after" training and "before" it (NaN where not known)."""
    pairs = run.pairs
    assert pairs.tokens is not None
    chosen, rejected = pairs.tokens.T
    found = {}
    for when, which in (("after", "policy"), ("before", "start")):
        one, other = pairs.column(f"{which}_chosen"), pairs.column(f"{which}_rejected")
        if run.reduction == "mean":
            found[when] = one * chosen - other * rejected, one - other
        else:
            found[when] = one - other, one / chosen - other / rejected
    return found


_KINDS = (
    ("both above 0", COLOURS[0], "o"),
    ("only by sums", COLOURS[2], "^"),
    ("only by means", COLOURS[1], "v"),
    ("neither", "#000000", "x"),
)


def sums_beside_means(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws each pair's gap by sums (across) and by means (up) after training; one panel per run. And notes."""
    figure, axes = panels(len(runs), heights=(5.0, 4.6, 4.2))
    found = [both_gaps(run) for run in runs]
    across = limits(*(gaps["after"][0] for gaps in found), include=(0.0,))
    up = limits(*(gaps["after"][1] for gaps in found), include=(0.0,))
    notes: list[str] = []
    for panel, run, gaps in zip(axes, runs, found, strict=True):
        x, y = gaps["after"]
        panel.set(xlim=across, ylim=up)
        panel.axhline(0, color="#222222", linewidth=0.9, zorder=1)
        panel.axvline(0, color="#222222", linewidth=0.9, zorder=1)
        masks = (x > 0) & (y > 0), (x > 0) & (y <= 0), (x <= 0) & (y > 0), (x <= 0) & (y <= 0)
        for mask, (_, colour, marker) in zip(masks, _KINDS, strict=True):
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
        panel.set_title(f"{run_title(run)}\nabove 0: {_share(x)} by sums, {_share(y)} by means")
        panel.set_xlabel("gap by sums (nats per response)")
        panel.set_ylabel("gap by means (nats per token)")
        before = gaps["before"]
        if np.isfinite(before[0]).all():
            notes.append(f"{run.letter} before training: {_share(before[0])} above 0 by sums, {_share(before[1])} by means.")
        beyond = outside(x, y, across, up)
        if beyond:
            notes.append(f"{run.letter}: {beyond} of {len(x)} pairs lie outside the axes and are drawn at their edge.")
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", label=label) for label, colour, marker in _KINDS]
    legend(figure, handles, columns=4)
    return figure, notes


def _share(gaps: np.ndarray) -> str:
    return f"{100 * np.mean(gaps > 0):.0f} %"
