"""Draws the pictures of single held-out pairs: phase portrait, distributions of the gap, displacement."""

import math

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..gaps import in_undesirable_region
from ..intervals import clopper_pearson
from .run import HeldOut, Run, by_unit
from .style import COLOURS, LINES, OUTCOMES, QUIET, U_SHADE, canvas, legend, panels, plain_ticks, run_style, run_title

#: The most arrows drawn; with more pairs, only this many get one.
MOST_ARROWS = 300
#: The most gaps at which a curve's interval is computed.
MOST_INTERVALS = 200
_BINS = 40
#: With more runs than this in the same axes, shades are fainter.
_FEW = 4


def outcomes(pairs: HeldOut) -> dict[str, np.ndarray]:
    """Masks, (n,), of the pairs that prefer chosen, lie in U, or do neither. Each pair is in exactly one."""
    prefers = pairs.gap > 0
    in_u = in_undesirable_region(pairs.gap, pairs.ref_gap)
    return {"prefers": prefers, "in_u": in_u, "neither": ~prefers & ~in_u}


def limits(*values: np.ndarray, include: tuple[float, ...] = ()) -> tuple[float, float]:
    """Axis limits around all values; only the inner 99 % if outliers would squeeze the rest into a line."""
    found = np.concatenate([np.asarray(value, dtype=float).ravel() for value in values])
    found = found[np.isfinite(found)]
    inner = np.quantile(found, [0.005, 0.995]) if len(found) else np.zeros(2)
    low, high = (found.min(), found.max()) if len(found) else (0.0, 0.0)
    if high - low > 3 * (inner[1] - inner[0]) > 0:
        low, high = inner
    low, high = min(low, *include), max(high, *include)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def outside(pairs_x: np.ndarray, pairs_y: np.ndarray, across: tuple[float, float], up: tuple[float, float]) -> int:
    """The number of points outside the axes."""
    return int(np.sum((pairs_x < across[0]) | (pairs_x > across[1]) | (pairs_y < up[0]) | (pairs_y > up[1])))


def evenly(order: np.ndarray, most: int) -> np.ndarray:
    """At most `most` indices, evenly spaced in the order of `order`. Deterministic."""
    ranked = np.argsort(order, kind="stable")
    return ranked if len(ranked) <= most else ranked[np.linspace(0, len(ranked) - 1, most).round().astype(int)]


def _count(share: np.ndarray) -> str:
    return f"{100 * np.mean(share):.0f} %"


def phase_portrait(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws the phase portrait and returns it with notes: δ_ref across, δ_θ up, one arrow per pair, one panel per run."""
    figure, axes = panels(len(runs))
    notes: list[str] = []
    seen: set[str] = set()
    for group in by_unit(runs):
        held = [run.pairs for run in group]
        across = limits(*(pairs.ref_gap for pairs in held), include=(0.0,))
        gammas = tuple(run.gamma or 0.0 for run in group)
        up = limits(*(pairs.gap for pairs in held), *(pairs.start_gap for pairs in held), include=(0.0, *gammas))
        for run in group:
            seen |= _portrait(axes[runs.index(run)], run, across, up)
            beyond = outside(run.pairs.ref_gap, run.pairs.gap, across, up)
            if beyond:
                notes.append(
                    f"{run.letter}: {beyond} of {len(run.pairs)} pairs lie outside the axes and are drawn at their edge."
                )
            if len(run.pairs) > MOST_ARROWS:
                notes.append(
                    f"{run.letter}: arrows for {MOST_ARROWS} of {len(run.pairs)} pairs, evenly spaced in δ_ref; heads for all."
                )
            if not np.isfinite(run.pairs.start_gap).any():
                notes.append(f"{run.letter}: no arrows, because the gaps before training are not known.")
    handles: list[Artist] = [Patch(color=U_SHADE, label="U, the undesirable region")]
    handles += [Line2D([], [], color=QUIET, linestyle=LINES[1], label="δ_θ = δ_ref (the reference itself)")]
    if any(run.gamma is not None for run in runs):
        handles.append(Line2D([], [], color=COLOURS[2], linestyle=LINES[3], linewidth=1.8, label="δ_θ = γ, the gap asked for"))
    handles += [Patch(color=colour, label=label) for key, (label, colour, _) in OUTCOMES.items() if key in seen]
    handles += [
        Line2D([], [], color=QUIET, marker=marker, linestyle="", label=label)
        for marker, label in (
            ("^", "after: the gap grew"),
            ("v", "after: the gap fell"),
            ("o", "after: start not known"),
        )
        if marker in seen
    ]
    legend(figure, handles, columns=4)
    return figure, notes


def _portrait(axes: Axes, run: Run, across: tuple[float, float], up: tuple[float, float]) -> set[str]:
    """Draws one panel and returns the outcomes and markers in it."""
    pairs = run.pairs
    seen: set[str] = set()
    axes.set(xlim=across, ylim=up)
    corner = max(across[0], up[0])
    if corner < 0:
        # The triangle between the diagonal and 0, cut off by the axes.
        axes.fill([across[0], across[0], corner, 0.0], [0.0, corner, corner, 0.0], color=U_SHADE, zorder=0, linewidth=0)
    ends = max(across[0], up[0]), min(across[1], up[1])
    if ends[0] < ends[1]:
        axes.plot(ends, ends, color=QUIET, linestyle=LINES[1], linewidth=1.2, zorder=1)
    axes.axhline(0, color="#222222", linewidth=1.0, zorder=1)
    axes.axvline(0, color="#222222", linewidth=0.6, zorder=1)
    if run.gamma is not None:
        axes.axhline(run.gamma, color=COLOURS[2], linestyle=LINES[3], linewidth=1.8, zorder=2)

    x, y, start = np.clip(pairs.ref_gap, *across), np.clip(pairs.gap, *up), np.clip(pairs.start_gap, *up)
    shown = evenly(pairs.ref_gap, MOST_ARROWS)
    size, width = min(34.0, max(8.0, 500 / math.sqrt(len(pairs)))), min(1.3, max(0.8, 14 / math.sqrt(len(shown))))
    alpha = min(0.75, max(0.5, 10 / math.sqrt(len(shown))))
    for key, mask in outcomes(pairs).items():
        if not mask.any():
            continue
        seen.add(key)
        _, colour, _ = OUTCOMES[key]
        arrows = shown[mask[shown] & np.isfinite(start[shown])]
        shafts = np.stack([np.stack([x[arrows], start[arrows]], 1), np.stack([x[arrows], y[arrows]], 1)], 1)
        axes.add_collection(LineCollection(list(shafts), colors=colour, linewidths=width, alpha=alpha, zorder=3))
        for marker, chosen in (
            ("^", pairs.gap >= pairs.start_gap),
            ("v", pairs.gap < pairs.start_gap),
            ("o", np.isnan(start)),
        ):
            of_kind = mask & chosen
            if of_kind.any():
                seen.add(marker)
                axes.scatter(x[of_kind], y[of_kind], s=size, marker=marker, color=colour, alpha=alpha, linewidths=0, zorder=4)

    plain_ticks(axes)
    masks = outcomes(pairs)
    axes.set_title(
        f"{run_title(run)}\n{len(pairs)} pairs: {_count(masks['in_u'])} in U, {_count(masks['prefers'])} prefer chosen"
    )
    axes.set_xlabel(f"reference gap δ_ref ({run.unit})")
    axes.set_ylabel(f"policy gap δ_θ ({run.unit})")
    room = min(-across[0] / (across[1] - across[0]), -up[0] / (up[1] - up[0]))
    if room > 0.12:
        axes.annotate(
            "U",
            (across[0], 0.0),
            xytext=(8, -8),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=20,
            fontweight="bold",
            color="#8A3800",
            alpha=0.6,
            zorder=1,
        )
    return seen


def _edges(span: tuple[float, float]) -> np.ndarray:
    """Edges of about `_BINS` equal bins over a span; 0 is an edge."""
    width = (span[1] - span[0]) / _BINS
    return width * np.arange(math.floor(span[0] / width), math.ceil(span[1] / width) + 1)


def _histogram(axes: Axes, gaps: np.ndarray, edges: np.ndarray, **style) -> float:
    """Draws the share of pairs in each bin, in %, and returns the highest. The outermost bins count all gaps beyond them."""
    width = np.ptp(edges)
    inside = np.clip(gaps, edges[0] + 1e-9 * width, edges[-1] - 1e-9 * width)
    shares = axes.hist(inside, edges.tolist(), weights=np.full(len(gaps), 100.0 / len(gaps)), **style)[0]
    return float(np.max(shares))


def gap_distributions(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws histograms of the policy's gap before and after training and of the reference's; one panel per run. And notes."""
    figure, axes = panels(len(runs), heights=(4.2, 3.7, 3.3))
    notes: list[str] = []
    kinds: dict[str, Artist] = {}
    tops: list[float] = []
    for group in by_unit(runs):
        values = [gap for run in group for gap in (run.pairs.gap, run.pairs.ref_gap, run.pairs.start_gap)]
        edges = _edges(limits(*values, include=(0.0, *(run.gamma or 0.0 for run in group))))
        for run in group:
            panel, pairs = axes[runs.index(run)], run.pairs
            same = pairs.starts_at_reference
            name = "before training = reference δ_ref" if same else "reference δ_ref"
            tops.append(_histogram(panel, pairs.ref_gap, edges, color="#BBBBBB", edgecolor="#BBBBBB", label=name))
            if not same and np.isfinite(pairs.start_gap).all():
                before = {"color": "#000000", "linestyle": "--", "linewidth": 1.2, "label": "before training δ_θ"}
                tops.append(_histogram(panel, pairs.start_gap, edges, histtype="step", **before))
            after = {"color": COLOURS[0], "linewidth": 1.9, "label": "after training δ_θ"}
            tops.append(_histogram(panel, pairs.gap, edges, histtype="step", **after))
            panel.axvline(0, color="#222222", linewidth=1.0)
            if run.gamma is not None:
                panel.axvline(run.gamma, color=COLOURS[2], linestyle=LINES[3], linewidth=1.8, label="γ, the gap asked for")
            kinds |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
            plain_ticks(panel)
            panel.set_xlim(edges[0], edges[-1])
            panel.set_title(f"{run_title(run)}\n{_count(pairs.gap > 0)} above 0 after, {_count(pairs.ref_gap > 0)} of δ_ref")
            panel.set_xlabel(f"gap ({run.unit})")
            panel.set_ylabel("share of pairs (%)")
            gaps = np.concatenate([pairs.gap, pairs.ref_gap])
            beyond = int(np.sum((gaps < edges[0]) | (gaps > edges[-1])))
            if beyond:
                notes.append(
                    f"{run.letter}: {beyond} of {len(gaps)} gaps lie outside the axes and are counted in the outermost bars."
                )
    for panel in axes:
        panel.set_ylim(0, 1.05 * max(tops))
    legend(figure, list(kinds.values()), columns=4)
    return figure, notes


def gaps_together(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws the share of pairs below each gap, all runs of one unit in the same axes. And notes."""
    groups = by_unit(runs)
    figure = canvas(0.6 + 4.0 * len(groups))
    handles, reference_handles, notes = [], [], []
    for row, group in enumerate(groups):
        axes = figure.add_subplot(len(groups), 1, row + 1)
        across = limits(*(run.pairs.gap for run in group), *(run.pairs.ref_gap for run in group), include=(0.0,))
        references: list[np.ndarray] = []
        for run in group:
            style = {**run_style(run), "marker": None}
            handles += _steps(axes, run.pairs.gap, **style, linewidth=2.0, label=f"{run_title(run)}, after")
            _shade(axes, run.pairs.gap, run_style(run)["color"], 0.15 if len(group) <= _FEW else 0.06)
            # Draw a reference that several runs share only once.
            gaps = np.sort(run.pairs.ref_gap)
            if not any(len(gaps) == len(old) and np.allclose(gaps, old, atol=1e-3) for old in references):
                references.append(gaps)
                whose = (
                    "reference δ_ref"
                    if len(group) == len(runs) and len(references) == 1
                    else f"reference δ_ref of {run.letter}"
                )
                line = LINES[(len(references) - 1) % len(LINES)]
                reference_handles += _steps(axes, gaps, color="#999999", linewidth=1.6, linestyle=line, label=whose)
                _shade(axes, gaps, "#999999", 0.15 if len(group) <= _FEW else 0.06)
        axes.axvline(0, color="#222222", linewidth=1.0)
        plain_ticks(axes)
        axes.set(xlim=across, ylim=(-1, 101), xlabel=f"gap ({group[0].unit})", ylabel="pairs with a smaller gap (%)")
        beyond = sum(int(np.sum((run.pairs.gap < across[0]) | (run.pairs.gap > across[1]))) for run in group)
        if beyond:
            notes.append(f"{beyond} gaps lie outside the axes.")
    shade = Patch(color=QUIET, alpha=0.3, linewidth=0, label="shade: exact 95 % interval at each gap")
    legend(figure, [*handles, *reference_handles, shade], columns=min(3, len(handles) + 1))
    return figure, notes


def _steps(axes: Axes, gaps: np.ndarray, **style) -> list[Line2D]:
    ordered = np.sort(gaps)
    shares = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
    return axes.step(np.concatenate([ordered[:1], ordered]), np.concatenate([[0.0], shares]), where="post", **style)


def _shade(axes: Axes, gaps: np.ndarray, colour: str, alpha: float) -> None:
    """Shades the exact interval of the share of pairs below each gap; of many pairs at some of their gaps."""
    ordered = np.sort(gaps)
    below = evenly(ordered, MOST_INTERVALS)
    ends = 100 * np.array([clopper_pearson(int(place) + 1, len(ordered)) for place in below])
    axes.fill_between(ordered[below], ends[:, 0], ends[:, 1], step="post", color=colour, alpha=alpha, linewidth=0)


def displacement_of_pairs(runs: list[Run]) -> tuple[Figure, list[str]]:
    """Draws how far each pair's chosen (across) and rejected (up) log-probs moved; one panel per run. And notes."""
    figure, axes = panels(len(runs), heights=(5.0, 4.6, 4.0))
    notes: list[str] = []
    seen: set[str] = set()
    for group in by_unit(runs):
        shifts = {side: [run.pairs.shift(side) for run in group] for side in ("chosen", "rejected")}
        across, up = limits(*shifts["chosen"], include=(0.0,)), limits(*shifts["rejected"], include=(0.0,))
        for run in group:
            panel, pairs = axes[runs.index(run)], run.pairs
            panel.set(xlim=across, ylim=up)
            ends = max(across[0], up[0]), min(across[1], up[1])
            if ends[0] < ends[1]:
                panel.plot(ends, ends, color=QUIET, linestyle=LINES[1], linewidth=1.2, zorder=1)
            panel.axhline(0, color="#222222", linewidth=0.9, zorder=1)
            panel.axvline(0, color="#222222", linewidth=0.9, zorder=1)
            x, y = pairs.shift("chosen"), pairs.shift("rejected")
            for key, mask in outcomes(pairs).items():
                if mask.any():
                    seen.add(key)
                    _, colour, marker = OUTCOMES[key]
                    panel.scatter(
                        np.clip(x[mask], *across),
                        np.clip(y[mask], *up),
                        s=min(30, max(8, 500 / math.sqrt(len(pairs)))),
                        marker=marker,
                        color=colour,
                        alpha=0.65,
                        linewidths=1.0 if marker == "x" else 0.0,
                        zorder=3,
                    )
            plain_ticks(panel)
            both, grew = (x < 0) & (y < 0), x > y
            panel.set_title(f"{run_title(run)}\nboth fell for {_count(both)}, gap above δ_ref for {_count(grew)}")
            panel.set_xlabel(f"chosen log-prob moved by ({run.unit})")
            panel.set_ylabel(f"rejected log-prob moved by ({run.unit})")
            beyond = outside(x, y, across, up)
            if beyond:
                notes.append(f"{run.letter}: {beyond} of {len(pairs)} pairs lie outside the axes and are drawn at their edge.")
    handles = [Line2D([], [], color=QUIET, linestyle=LINES[1], label="both moved alike: δ_θ = δ_ref")]
    handles += [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for key, (label, colour, marker) in OUTCOMES.items()
        if key in seen
    ]
    legend(figure, handles, columns=4)
    return figure, notes
