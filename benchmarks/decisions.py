"""
Searches the demo's recipe: constraints and plain DPO on the embedded decisions, at equal steps, KL and accuracy.

    python -m benchmarks.decisions run --arms dpo-0.1 clip-1 --out decisions.json
    python -m benchmarks.decisions table decisions.json

Each run trains the embedded model as the demo does (LoRA, batches of 4), with a constant learning rate, so that what is
measured after some steps is what a run of so many steps would give. Measured each time: decisions on the held-out rows
(trl_cpo/decisions.py), and on the package's general prompts KL to the start on the policy's own samples, in nats a token,
and the share of repeated 3-grams of greedy answers. Results are added to the file after each measurement.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

#: Of every arm, unless it says otherwise.
BASE = {"learning_rate": 2e-4, "constraint": "clip", "beta": 1.0, "gamma": 1.0}
#: What differs in each arm, by name.
ARMS: dict[str, dict[str, Any]] = {
    **{f"dpo-{beta:g}": {"constraint": "none", "beta": beta, "gamma": 0.0} for beta in (0.03, 0.1, 0.3, 1.0)},
    **{
        f"dpo-{beta:g}-lr{rate:g}": {"constraint": "none", "beta": beta, "gamma": 0.0, "learning_rate": rate}
        for beta in (0.1, 0.3, 1.0)
        for rate in (1e-4, 4e-4)
    },
    "clip-1": {},
    **{f"clip-1-lr{rate:g}": {"learning_rate": rate} for rate in (1e-4, 4e-4)},
    "clip-0.3": {"beta": 0.3},
    "clip-3": {"beta": 3.0},
    "clip-1-gamma2": {"gamma": 2.0},
    "clip-1-gamma3": {"gamma": 3.0},
    "softplus-1": {"constraint": "softplus", "tau": 2.0, "alpha": 1.0},
    "penalty-1": {"constraint": "penalty", "penalty_weight": 1.0},
    "penalty-0.1-bound": {"constraint": "penalty", "beta": 0.1, "penalty_weight": 10.0},
    "lagrangian-0.1": {"constraint": "lagrangian", "beta": 0.1, "epsilon": 0.1},
}
STEPS = (30, 60, 90)
#: Of a table: KL on general prompts (nats a token) and held-out shares at which arms are compared.
EQUAL_KL = (0.01, 0.02, 0.05)
EQUAL_RIGHT = (0.5, 0.6, 0.7)


def trainer_of(model: str, train, options: dict[str, Any], steps: int, seed: int, callbacks):
    """A trainer with the demo's settings; `options` are an arm's."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

    args = CPOConstrainedConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=256,
        max_steps=steps,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        prefix_sharing=True,
        precompute_ref_log_probs=True,
        dataloader_pin_memory=False,
        narrate=False,
        **BASE | options,
    )
    return CPOConstrainedTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def run(arm: str, model: str, seed: int, measured_at, save) -> None:
    """Trains one arm and hands a record to `save` at each of the steps `measured_at`."""
    from transformers import TrainerCallback

    from trl_cpo.data.loading import load_pairs
    from trl_cpo.decisions import counts, decide
    from trl_cpo.price import meter_of

    train, test = load_pairs("demo", "train"), list(load_pairs("demo", "test"))
    began = time.time()

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step not in measured_at:
                return
            decisions = decide(trainer.model, trainer.processing_class, test)
            price = meter.measure(state.global_step)
            general = price.sets["general"]
            save(
                {
                    "arm": arm,
                    "seed": seed,
                    "step": state.global_step,
                    "options": BASE | ARMS[arm],
                    "decisions": counts(decisions),
                    "outcomes": {
                        name: "".join("01"[each.outcomes[name]] for each in decisions) for name in decisions[0].outcomes
                    },
                    "kl_general": general.kl.to_dict(),
                    "repetition_general": general.repetition.value,
                    "repetition_general_start": meter.before["general"].repetition.value,
                    "samples": [sample["greedy"] for sample in general.samples[:4]],
                    "seconds": round(time.time() - began),
                }
            )

    trainer = trainer_of(model, train, ARMS[arm], max(measured_at), seed, [Measure()])
    meter = meter_of(trainer, pairs=None, prompts=16, max_new_tokens=32)
    trainer.train()


def at_level(curve: list[tuple[float, float]], level: float) -> float | None:
    """The second number where the first reaches `level`, between neighbouring points of a curve; None: it does not."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if min(x0, x1) <= level <= max(x0, x1) and x0 != x1:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return None


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: every measurement, then each arm at equal KL and at equal accuracy."""
    head = ("arm", "seed", "steps", "preferred", "right of six", "greedy right", "greedy names one", "KL", "repetition")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    arms: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda each: (each["arm"], each["seed"], each["step"])):
        arms.setdefault((record["arm"], record["seed"]), []).append(record)
        shares = [
            f"{100 * part['share']:.0f} % ({100 * part['low']:.0f} to {100 * part['high']:.0f})"
            for part in (record["decisions"][name] for name in ("preferred", "right", "answered", "named"))
        ]
        cells = (record["arm"], record["seed"], record["step"], *shares, f"{record['kl_general']['value']:.4f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {record['repetition_general']:.3f} |")
    head = ("arm", "seed", *(f"right at KL {kl:g}" for kl in EQUAL_KL), *(f"KL at {100 * r:.0f} % right" for r in EQUAL_RIGHT))
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (arm, seed), found in arms.items():
        # Every arm starts at no KL with the same decisions.
        start = next((r["decisions"]["right"]["share"] for r in records if r["step"] == 0), None)
        points = [] if start is None else [(0.0, start)]
        points += [(r["kl_general"]["value"], r["decisions"]["right"]["share"]) for r in found if r["step"]]
        rights = [at_level(points, kl) for kl in EQUAL_KL]
        costs = [at_level([(right, kl) for kl, right in points], right) for right in EQUAL_RIGHT]
        cells = ["–" if r is None else f"{100 * r:.0f} %" for r in rights] + ["–" if c is None else f"{c:.3f}" for c in costs]
        if found[-1]["step"]:
            lines.append(f"| {arm} | {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decisions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="train and measure arms")
    runs.add_argument("--arms", nargs="+", choices=sorted(ARMS), required=True)
    runs.add_argument("--steps", type=int, nargs="+", default=STEPS, help="where to measure; the last one ends the run")
    runs.add_argument("--seed", type=int, default=42)
    runs.add_argument("--model", help="model folder; default: the embedded SmolLM2-135M-Instruct")
    runs.add_argument("--out", type=Path, default=Path("decisions.json"), help="JSON file to add to")
    tables = verbs.add_parser("table", help="print what was measured")
    tables.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.verb == "table":
        print(table(json.loads(options.file.read_text(encoding="utf-8"))))
        return
    if options.model is None:
        from trl_cpo.data.demo.model import demo_model_folder

        options.model = str(demo_model_folder())

    def save(record: dict[str, Any]) -> None:
        known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
        options.out.write_text(json.dumps([*known, record], indent=1) + "\n", encoding="utf-8")
        right, kl = record["decisions"]["right"]["share"], record["kl_general"]["value"]
        print(f"{record['arm']} step {record['step']}: right {right:.2f}, KL {kl:.4f}, {record['seconds']} s", flush=True)

    for arm in options.arms:
        run(arm, options.model, options.seed, options.steps, save)


if __name__ == "__main__":
    main()
