"""
Puts what the demo printed under several seeds into one table: clip beside DPO, and their difference.

    python -m benchmarks.demo_seeds

The runs are `bash run.sh demo --seed N` and the same with `--constraint none --beta 0.1`; what each printed at its end is
in `benchmarks/demo-<clip or dpo>-<seed>.txt` (of seed 42 without the number).
"""

import re
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student

SEEDS = (42, 43, 44)
ARMS = {"clip": "clip, β 1", "dpo": "DPO, β 0.1"}
#: Column, and how its line begins; the number after training is the one that is taken.
SHARES = {
    "preferred": "the right option beats the wrong one of its pair",
    "likeliest of six": "the right option is the likeliest of all",
    "greedy answer right": "the greedy answer is the right option",
}
KL = "KL to the reference, general prompts"


def read(arm: str, seed: int) -> dict[str, float]:
    """Percent after training, and the KL, nats a token, out of what a run printed."""
    name = f"demo-{arm}.txt" if seed == 42 else f"demo-{arm}-{seed}.txt"
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    found = {}
    for column, line in SHARES.items():
        found[column] = float(re.search(rf"^{re.escape(line)}\s+\d+ % \(.*?\)\s+(\d+) %", text, re.MULTILINE)[1])
    found["KL, general prompts"] = float(re.search(rf"^{re.escape(KL)}\s+\S+\s+(\S+)$", text, re.MULTILINE)[1])
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t over seeds)."""
    return mean(values), student.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))


def table() -> str:
    """A row a run, then each arm's mean and the difference of the same seeds."""
    runs = {arm: [read(arm, seed) for seed in SEEDS] for arm in ARMS}
    columns = list(runs["clip"][0])
    lines = [f"| | seed | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]

    def row(name: str, seed: str, cells: list[str]) -> None:
        lines.append("| " + " | ".join([name, seed, *cells]) + " |")

    def shown(column: str, value: float) -> str:
        return f"{value:.3f}" if column.startswith("KL") else f"{value:.0f} %"

    def spread(column: str, values: list[float], sign: str = "") -> str:
        middle, half = interval(values)
        return f"{middle:{sign}.3f} ± {half:.3f}" if column.startswith("KL") else f"{middle:{sign}.1f} ± {half:.1f}"

    for arm, name in ARMS.items():
        for seed, run in zip(SEEDS, runs[arm], strict=True):
            row(name, str(seed), [shown(column, run[column]) for column in columns])
    for arm, name in ARMS.items():
        row(name, "mean", [spread(column, [run[column] for run in runs[arm]]) for column in columns])
    pairs = list(zip(runs["clip"], runs["dpo"], strict=True))
    row("clip less DPO", "mean", [spread(column, [a[column] - b[column] for a, b in pairs], "+") for column in columns])
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
