"""
Where damage begins: the price of good and of broken runs, side by side, for the thresholds in trl_cpo/price/damage.py.

    python -m benchmarks.damage run --out damage.json
    python -m benchmarks.damage run --settings "DPO, means, 1e-3" --every 15 --device cuda --model FOLDER --out damage-1.json
    python -m benchmarks.damage table benchmarks/damage.json damage-1.json

Trains the embedded SmolLM2-135M-Instruct with LoRA on the demo's long answers, in several settings from harmless to
destructive, and measures every few steps. Beside them: repetition in the pairs' own answers. About 5 minutes a setting on
two cores; each measurement is written at once. `table` sorts the measurements of several files by KL on general prompts.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .devices import chosen, described

#: By name: constraint, beta, gamma, reduction, learning rate.
SETTINGS: dict[str, tuple[str, float, float, str, float]] = {
    f"{method}, {reduction}s, {rate}": (
        "clip" if method == "clip" else "none",
        2.5 if reduction == "mean" else 0.1,
        0.0 if method == "DPO" else 0.05 if reduction == "mean" else 1.0,
        reduction,
        float(rate),
    )
    for method in ("DPO", "clip")
    for reduction, rates in (("mean", ("3e-4", "6e-4", "1e-3")), ("sum", ("1e-4", "2e-4", "3e-4", "1e-3")))
    for rate in rates
}


def measured(name: str, options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """One setting: the price every few steps, with the share of held-out pairs preferred; each is saved at once."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
    from trl_cpo.data.reading import read_pairs
    from trl_cpo.engine.precision import float32_products
    from trl_cpo.price import meter_of

    constraint, beta, gamma, reduction, rate = SETTINGS[name]
    device = chosen(options.device)
    train, test = (read_pairs(options.pairs, split)[0] for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder:
        args = CPOConstrainedConfig(
            folder,
            constraint=constraint,
            beta=beta,
            gamma=gamma,
            logps_reduction=reduction,
            learning_rate=rate,
            use_cpu=device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            max_length=256,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=options.every,
            save_strategy="no",
            prefix_sharing=True,
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = CPOConstrainedTrainer(
            options.model,
            args=args,
            train_dataset=train,
            eval_dataset=test,
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0),
        )
        meter = meter_of(trainer, pairs=trainer.eval_dataset, prompts=options.prompts, max_new_tokens=options.tokens)
        rows: list[dict[str, Any]] = []
        about = {
            "setting": name,
            "seed": options.seed,
            "answers_cut_at": options.tokens,
            "device": described(device),
            "float32_products": float32_products(device.type),
        }

        class Measure(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics=None, **kwargs):
                price = meter.measure(state.global_step).to_dict()
                # How answers read is looked at on general prompts.
                price["sets"]["pairs"]["samples"] = []
                preferred, in_u = (metrics[f"eval_cpo/{key}"] for key in ("prefers_chosen", "in_undesirable_region"))
                before = {set_name: part.repetition.to_dict() for set_name, part in meter.before.items()}
                rows.append({**about, "preferred": preferred, "in_U": in_u, **price, "before": before})
                save(rows[-1])

        trainer.add_callback(Measure())
        trainer.train()
    return rows


def repetition_of_people(model: str, pairs: str) -> float:
    """Share of repeated 3-grams in the held-out chosen answers, cut as the model's own are."""
    from transformers import AutoTokenizer

    from trl_cpo.data.reading import read_pairs
    from trl_cpo.price import repeated

    tokenizer = AutoTokenizer.from_pretrained(model)
    counts = [
        repeated(tokenizer(row["chosen"][-1]["content"], add_special_tokens=False)["input_ids"][:64])
        for row in read_pairs(pairs, "test")[0]
    ]
    return sum(top for top, _ in counts) / sum(bottom for _, bottom in counts)


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: every measurement after the start, by KL on general prompts."""
    head = ("run", "seed", "steps", "preferred", "KL, general prompts", "3-grams repeated", "before", "NLL, chosen", "called")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in sorted(runs, key=lambda each: each["sets"]["general"]["kl"]["value"]):
        if not run["step"]:
            continue
        part = run["sets"]["general"]
        kl, before = part["kl"], run.get("before", {}).get("general")
        cells = [
            run["setting"],
            str(run.get("seed", "")),
            str(run["step"]),
            f"{100 * run['preferred']:.0f} %",
            f"{kl['value']:.3f} ({kl['low']:.3f} to {kl['high']:.3f})",
            f"{100 * part['repetition']['value']:.0f} %",
            "" if before is None else f"{100 * before['value']:.0f} %",
            f"{run['nll']['chosen']:.2f}",
            "damaged" if run.get("damage") else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.damage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="train and measure settings")
    runs.add_argument("--settings", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS), metavar="NAME")
    runs.add_argument("--every", type=int, default=30, help="steps between two measurements")
    runs.add_argument("--epochs", type=float, default=1.0, help="of 60 steps each")
    runs.add_argument("--max_steps", type=int, default=-1)
    runs.add_argument("--prompts", type=int, default=16, help="of each set")
    runs.add_argument("--tokens", type=int, default=48, help="at which answers are cut")
    runs.add_argument("--seed", type=int, default=42)
    runs.add_argument("--pairs", default="demo-answers")
    runs.add_argument("--model", default="demo", help="model folder; default: the embedded SmolLM2-135M-Instruct")
    runs.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    runs.add_argument("--out", type=Path, default=Path("damage.json"), help="JSON file to write")
    tables = verbs.add_parser("table", help="print what was measured")
    tables.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.verb == "table":
        print(table([run for file in options.files for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]))
        return

    from trl_cpo.data.models import source_of
    from trl_cpo.files.atomic import write_json

    options.model = source_of(options.model)
    results = {"repetition_of_people": repetition_of_people(options.model, options.pairs), "runs": []}

    def save(row: dict[str, Any]) -> None:
        results["runs"].append(row)
        write_json(options.out, results)

    for name in options.settings:
        print(table(measured(name, options, save)), flush=True)


if __name__ == "__main__":
    main()
