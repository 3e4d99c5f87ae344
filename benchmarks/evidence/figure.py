"""The figure of the README: score over KL, decisions beside long sampled answers. Drawn from the records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import BASELINE, Run, method_of, read, starts

#: Of each panel: experiment, variant, largest KL, title, axis.
PANELS = (
    ("decisions", "1 token", 2.0, "Decisions (one-word answers)", "held-out right, %", "KL, nats a prompt"),
    ("sampled", "noiseless", 4.0, "Sampled answers (up to 40 tokens)", "reward of own answers", "KL, nats an answer"),
)
COLOURS = {"dpo": "#666666", "clip": "#c2410c", "simpo": "#1d4ed8", "sft": "#7c3aed", "clip reach": "#15803d"}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 400, 300, 56, 40, 44


def figure(folder: Path, shown: Sequence[str] = tuple(COLOURS)) -> str:
    """The figure as SVG."""
    size = f'width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect width="{2 * WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for at, panel in enumerate(PANELS):
        parts += _panel(read(folder / f"{panel[0]}.jsonl"), panel, at * WIDTH, shown)
    return "\n".join([*parts, "</svg>", ""])


def curves(runs: list[Run], variant: str, score: str, methods: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Of each arm of the final runs: mean KL and mean score over the seeds that all of these arms have, from the start on."""
    begun, found = starts(runs), {}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run["variant"] == variant and run["seed"] != 0 and method_of(run["arm"]) in methods:
            groups.setdefault(run["arm"], []).append(run)
    shared = set.intersection(*({run["seed"] for run in own} for own in groups.values()))
    for arm, every in groups.items():
        own = [run for run in every if run["seed"] in shared]
        curve = [(0.0, _mean([begun[variant, run["seed"]]["curve"][0]["test"][score] for run in own]))]
        for step in range(len(own[0]["curve"])):
            tests = [run["curve"][step]["test"] for run in own]
            curve.append((_mean([test["kl"] for test in tests]), _mean([test[score] for test in tests])))
        found[arm] = curve
    return found


def _panel(runs: list[Run], panel: tuple[Any, ...], shift: int, shown: Sequence[str]) -> list[str]:
    experiment, variant, largest, title, axis, kl_axis = panel
    percent = experiment == "decisions"
    score = "right" if percent else "reward"
    found = {arm: _cut(curve, largest) for arm, curve in curves(runs, variant, score, shown).items()}
    values = [y for curve in found.values() for _, y in curve]
    step = 0.05 if percent else 0.1
    low, high = step * (min(values) // step), step * (1 + max(values) // step)
    width, height = WIDTH - LEFT - 96, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return shift + LEFT + width * x / largest, TOP + height * (high - y) / (high - low)

    lines = [f'<text x="{shift + LEFT}" y="20" font-weight="bold">{title}</text>']
    lines.append(f'<text x="{shift + LEFT}" y="34" fill="#666666">{axis}</text>')
    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        x, y = place(0, value)
        lines.append(f'<path d="M{x:.1f} {y:.1f}h{width}" stroke="#dddddd"/>')
        label = f"{100 * value:.0f}" if percent else f"{value:.1f}"
        lines.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="#666666">{label}</text>')
    for part in range(5):
        x, y = place(largest * part / 4, low)
        lines.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle" fill="#666666">{largest * part / 4:g}</text>')
    x, y = place(largest / 2, low)
    lines.append(f'<text x="{x:.1f}" y="{y + 32:.1f}" text-anchor="middle" fill="#666666">{kl_axis}</text>')
    ends = []
    for arm, curve in found.items():
        colour = COLOURS[method_of(arm)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        dash = ' stroke-dasharray="5 3"' if method_of(arm) == BASELINE else ""
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        x, y = place(*curve[-1])
        ends.append([y, x, _name(arm), colour])
    # Labels stand beside the ends of their curves, 14 apart at least.
    ends.sort()
    for above, end in zip(ends, ends[1:], strict=False):
        end[0] = max(end[0], above[0] + 14)
    for y, x, name, colour in ends:
        lines.append(f'<text x="{x + 5:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return lines


def _name(arm: str) -> str:
    names = {"dpo": "DPO", "simpo": "SimPO", "sft": "cross-entropy"}
    if method_of(arm) == "clip reach":
        return "clip, reach"
    beta = next((word for word in arm.split() if word[0].isdigit()), None)
    return names.get(method_of(arm), method_of(arm)) + (f" β {beta}" if beta else "")


def _cut(curve: list[tuple[float, float]], largest: float) -> list[tuple[float, float]]:
    """A curve up to where it leaves the panel."""
    kept = curve[:1]
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x1 > largest:
            kept.append((largest, y0 + (y1 - y0) * (largest - x0) / (x1 - x0)))
            break
        kept.append((x1, y1))
    return kept


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
