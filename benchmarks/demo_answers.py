"""
The demo's second set under several seeds: the recipe demo-answers, and plain DPO with the same steps, by the package's trainer.

    python -m benchmarks.demo_answers run --seeds 42 43 44 --out demo-answers.json
    python -m benchmarks.demo_answers run --arms dpo --seeds 43 --device cuda --model FOLDER --out demo-answers-dpo-43.json
    python -m benchmarks.demo_answers table demo-answers.json demo-answers-dpo-43.json

Each run is `trl-cpo train --config demo-answers --seed N`, plain DPO with `--constraint none`: LoRA, float32, 60 steps of 4
pairs. Kept of each: held-out pairs preferred before and after, the price on general prompts and on the pairs' own, and
greedy answers to general prompts. Several processes write to files of their own; `table` takes them together.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .demo_seeds import interval
from .devices import chosen, described

#: By arm: its name, and the options that make it.
ARMS = {"clip": ("clip, the recipe", []), "dpo": ("DPO", ["--constraint", "none"])}
#: By column: whether it is a percentage, and what it is of a record, before (0) or after (1).
COLUMNS = {
    "preferred": (True, lambda record, end: record["preferred"][end]),
    "in U": (True, lambda record, end: record["in_U"][end]),
    "KL, general prompts": (False, lambda record, end: record["general"][end]["kl"]["value"]),
    "3-grams repeated there": (True, lambda record, end: record["general"][end]["repetition"]["value"]),
    "KL, pairs' prompts": (False, lambda record, end: record["pairs"][end]["kl"]["value"]),
    "3-grams repeated on these": (True, lambda record, end: record["pairs"][end]["repetition"]["value"]),
    "answers that end": (True, lambda record, end: record["pairs"][end]["ended"]["value"]),
}


def trained(arm: str, seed: int, model: str, device: Any, more: Sequence[str] = ()) -> dict[str, Any]:
    """The record of one run."""
    from trl_cpo.cli import main as command_line
    from trl_cpo.engine.precision import float32_products

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        words = ["train", "--config", "demo-answers", *ARMS[arm][1], "--model_name_or_path", model, "--seed", str(seed)]
        words += ["--use_cpu", str(device.type == "cpu").lower(), "--output_dir", str(folder), *more]
        if (code := command_line(words)) != 0:
            raise RuntimeError(f"trl-cpo {' '.join(words)} ended with {code}")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        measured = json.loads((folder / "price.json").read_text(encoding="utf-8"))["measurements"]
    ends = measured[0], measured[-1]
    evaluated = metrics["before"], metrics["after"]
    settings = ("constraint", "beta", "gamma", "logps_reduction", "learning_rate", "num_train_epochs")
    return {
        "arm": arm,
        "seed": seed,
        "steps": ends[1]["step"],
        "device": described(device),
        "float32_products": float32_products(device.type),
        "settings": {name: metrics["config"][name] for name in settings},
        "preferred": [evaluation["eval_cpo/prefers_chosen"] for evaluation in evaluated],
        "in_U": [evaluation["eval_cpo/in_undesirable_region"] for evaluation in evaluated],
        "general": [end["sets"]["general"] for end in ends],
        "pairs": [{**end["sets"]["pairs"], "samples": []} for end in ends],
        "damage": ends[1]["damage"],
        "seconds": metrics["seconds"],
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: the start, a row a run, each arm's mean over seeds, and the difference of the same seeds."""
    lines = [f"| | seed | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    runs = {arm: {r["seed"]: r for r in sorted(records, key=lambda r: r["seed"]) if r["arm"] == arm} for arm in ARMS}
    if sum(map(len, runs.values())) < len(records):
        raise ValueError("An arm was run twice with one seed.")

    def row(name: str, seed: object, cells: Sequence[str]) -> None:
        lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")

    def one(record: dict[str, Any], end: int) -> tuple[str, ...]:
        found = [(percent, of(record, end)) for percent, of in COLUMNS.values()]
        return tuple(f"{100 * value:.0f} %" if percent else f"{value:.3f}" for percent, value in found)

    def spread(found: Sequence[dict[str, Any]], less: Sequence[dict[str, Any]] | None = None) -> list[str]:
        cells = []
        for percent, of in COLUMNS.values():
            values = [of(record, 1) for record in found]
            if less is not None:
                values = [value - of(other, 1) for value, other in zip(values, less, strict=True)]
            middle, half = interval(values)
            sign = "" if less is None else "+"
            cells.append(f"{100 * middle:{sign}.1f} ± {100 * half:.1f}" if percent else f"{middle:{sign}.3f} ± {half:.3f}")
        return cells

    # The same model for every run; devices may round its greedy answers apart.
    for cells in dict.fromkeys(one(record, 0) for record in records):
        row("the start", "", cells)
    for arm, by_seed in runs.items():
        for seed, record in by_seed.items():
            row(ARMS[arm][0], seed, one(record, 1))
    for arm, by_seed in runs.items():
        if len(by_seed) > 1:
            row(ARMS[arm][0], "mean", spread(list(by_seed.values())))
    both = sorted(set(runs["clip"]) & set(runs["dpo"]))
    if len(both) > 1:
        row("clip less DPO", "mean", spread(*([runs[arm][seed] for seed in both] for arm in ("clip", "dpo"))))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="train and measure; options that it does not know go to trl-cpo train")
    runs.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    runs.add_argument("--seeds", type=int, nargs="+", default=[42])
    runs.add_argument("--model", default="demo", help="model folder; default: the embedded SmolLM2-135M-Instruct")
    runs.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    runs.add_argument("--out", type=Path, default=Path("demo-answers.json"), help="JSON file to write")
    tables = verbs.add_parser("table", help="print what was measured")
    tables.add_argument("files", type=Path, nargs="+")
    options, more = parser.parse_known_args()
    if options.verb == "table":
        print(table([record for file in options.files for record in json.loads(file.read_text(encoding="utf-8"))]))
        return
    from trl_cpo.files.atomic import write_json

    records = []
    for seed in options.seeds:
        for arm in options.arms:
            records.append(trained(arm, seed, options.model, chosen(options.device), more))
            write_json(options.out, records)


if __name__ == "__main__":
    main()
