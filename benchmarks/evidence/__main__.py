"""
Runs the experiments of docs/evidence.md and prints their tables.

    python -m benchmarks.evidence decisions --text PATH            # tuning: every arm, one seed
    python -m benchmarks.evidence decisions --text PATH --final    # each method's best arm by the validation part, more seeds
    python -m benchmarks.evidence sampled --text PATH --final
    python -m benchmarks.evidence tables --into docs/evidence.md

PATH holds pairs as HH-RLHF writes them, for instance harmless-base's test split. Models are kept in --work, one line a run in
--records; a run that is recorded is not run again. `--small` tries all of it in two minutes with the package's own pairs.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import decisions, figure, misaligned, sampled, tables
from .text import learn_tokenizer, read_texts

RECORDS = Path(__file__).parent / "records"
#: Sizes: of the model and what it learns, and of every arm.
FULL: dict[str, Any] = {
    "model": {"width": 128, "layers": 6, "steps": 700, "batch": 32, "longest": 80},
    "vocabulary": 2000,
    "longest": 140,
    "decisions": {"pairs": 3000, "prompts": 400, "general": 32},
    "taught": {"steps": 1200, "learning_rate": 2e-3},
    "decisions_arms": {"batch": 32, "learning_rate": 1e-4, "steps": [10, 20, 40, 80, 120]},
    "sampled": {"questions": 6000, "held_out": 300, "new": 40},
    "sampled_arms": {"batch": 32, "learning_rate": 1e-4, "steps": [20, 40, 80, 120]},
    "misaligned": {"pairs_used": 1000, "new": 40},
    "turned": {"steps": 64, "learning_rate": 3e-4},
    "misaligned_arms": {"batch": 32, "learning_rate": 1e-4, "steps": [16, 32, 64, 96]},
}
SMALL: dict[str, Any] = {
    "model": {"width": 32, "layers": 1, "steps": 30, "batch": 8, "longest": 48},
    "vocabulary": 500,
    "longest": 140,
    "decisions": {"pairs": 64, "prompts": 16, "general": 4},
    "taught": {"steps": 20, "learning_rate": 1e-3},
    "decisions_arms": {"batch": 8, "learning_rate": 1e-3, "steps": [2, 4]},
    "sampled": {"questions": 64, "held_out": 8, "new": 24, "trial": True},
    "sampled_arms": {"batch": 8, "learning_rate": 1e-3, "steps": [2, 4]},
    "misaligned": {"pairs_used": 32, "new": 8},
    "turned": {"steps": 4, "learning_rate": 1e-3},
    "misaligned_arms": {"batch": 8, "learning_rate": 1e-3, "steps": [2, 4]},
}


class Records:
    """Runs, a line each; a run is found again by what tells it apart."""

    def __init__(self, file: Path):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.runs = [json.loads(line) for line in lines]

    def has(self, key: dict[str, Any]) -> bool:
        return any(all(run.get(name) == value for name, value in key.items()) for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


class Bench:
    """The texts, the tokenizer and the small model, made once in a folder."""

    def __init__(self, source: str, work: Path, scale: dict[str, Any]):
        from transformers import AutoTokenizer

        from .small import language_model

        self.source, self.work, self.scale = source, work, scale
        self.texts = read_texts(source, scale["longest"])
        told = [sampled.prompt(question) + " " + answer for question, answer in self.texts.exchanges["train"]]
        told += self.texts.turns["train"]
        base = work / "language-model"
        if not (base / "config.json").exists():
            learn_tokenizer(told, scale["vocabulary"], base)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.base, self.base_at = language_model(told, self.tokenizer, base, **scale["model"]), base
        asked = [question for question, _ in self.texts.exchanges["test"][: scale["decisions"]["general"]]]
        self.general = [self.tokenizer(sampled.prompt(question))["input_ids"] for question in asked]

    def decision(self, variant: str, arm: str, seed: int) -> dict[str, Any]:
        sizes = {name: self.scale["decisions"][name] for name in ("pairs", "prompts")}
        task = decisions.Task(self.texts, self.tokenizer, variant, **sizes)
        reference = decisions.reference_folder(self.work, self.base_at, task, variant, **self.scale["taught"])
        return decisions.run(arm, task, reference, self.general, scale=self.scale["decisions_arms"], seed=seed)

    def sampled(self, variant: str, arm: str, seed: int) -> dict[str, Any]:
        task = sampled.Task(self.work, self.base, self.tokenizer, self.texts, **self.scale["sampled"])
        return sampled.run(arm, variant, task, self.base_at, scale=self.scale["sampled_arms"], seed=seed)

    def misaligned(self, variant: str, arm: str, seed: int) -> dict[str, Any]:
        pairs = misaligned.read_pairs(self.source, self.scale["longest"])
        task = misaligned.Task(pairs, self.tokenizer, **self.scale["misaligned"])
        turned = {**self.scale["turned"], "seed": seed}
        reference = misaligned.reference_folder(self.work, self.base_at, task, variant, **turned)
        return misaligned.run(arm, task, reference, scale=self.scale["misaligned_arms"], seed=seed)


EXPERIMENTS = {"decisions": decisions.ARMS, "sampled": sampled.ARMS, "misaligned": misaligned.ARMS}
VARIANTS = {
    "decisions": tuple(decisions.VARIANTS),
    "sampled": ("noiseless", "bradley-terry"),
    "misaligned": tuple(misaligned.SHARES),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, arms in EXPERIMENTS.items():
        run = verbs.add_parser(name, help=f"run the experiment {name!r}")
        run.add_argument("--text", default=None, help="pairs to take texts from: file, folder or hub name")
        run.add_argument("--work", type=Path, default=Path("evidence-work"), help="folder for models and sampled answers")
        run.add_argument("--records", type=Path, default=RECORDS, help="folder of the records to add to")
        run.add_argument("--variant", default=VARIANTS[name][0], choices=VARIANTS[name])
        run.add_argument(
            "--arms", nargs="+", choices=sorted(arms), help="default: all, or with --final the best of each method"
        )
        run.add_argument("--seeds", type=int, nargs="+", help="default: 0, or with --final 1 to 5")
        if name in tables.LEVELS:
            run.add_argument("--final", action="store_true", help="the best arm of each method by the validation part")
        run.add_argument("--small", action="store_true", help="try the programs; the numbers mean nothing")
    table = verbs.add_parser("tables", help="print every table, or write those of a page and the figure beside it")
    table.add_argument("--records", type=Path, default=RECORDS)
    table.add_argument("--into", type=Path, help="page to fill")
    options = parser.parse_args(arguments)
    if options.verb == "tables":
        if options.into is None:
            print(tables.everything(options.records))
        else:
            text = options.into.read_text(encoding="utf-8")
            options.into.write_text(tables.filled(text, options.records), encoding="utf-8")
            options.into.with_suffix(".svg").write_text(figure.figure(options.records), encoding="utf-8")
        return
    if options.text is None and not options.small:
        parser.error("--text is missing: pairs as HH-RLHF writes them, or --small to try the programs with the package's own.")
    torch.set_num_threads(1)
    source = options.text or "demo-answers"
    bench = Bench(source, options.work, SMALL if options.small else FULL)
    records = Records(options.records / f"{options.verb}.jsonl")
    arms, tuned = options.arms or list(EXPERIMENTS[options.verb]), getattr(options, "final", False)
    if tuned and not options.arms:
        arms = list(tables.best_arms(records.runs, options.verb).values())
    runner = {"decisions": bench.decision, "sampled": bench.sampled, "misaligned": bench.misaligned}[options.verb]
    for seed in options.seeds or ([1, 2, 3, 4, 5] if tuned else [0]):
        for arm in ("start", *arms):
            key = {"experiment": options.verb, "variant": options.variant, "arm": arm, "seed": seed}
            if records.has(key):
                continue
            began = time.perf_counter()
            found = runner(options.variant, arm, seed)
            about = {
                "scale": bench.scale[f"{options.verb}_arms"],
                "settings": EXPERIMENTS[options.verb].get(arm, {}),
                "texts": bench.texts.digest,
                "seconds": round(time.perf_counter() - began),
                "when": time.strftime("%Y-%m-%d"),
                "versions": {name: version(name) for name in ("trl-cpo", "trl", "transformers", "torch")},
            }
            records.add({**key, **found, **about})
            print(tables.told(records.runs[-1]), flush=True)


if __name__ == "__main__":
    main()
