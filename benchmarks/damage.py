"""Where damage begins: the price of good and of broken runs, side by side, for the thresholds in trl_cpo/price/damage.py.

    python -m benchmarks.damage RESULTS.json

Trains the embedded SmolLM2-135M-Instruct with LoRA on the demo's long answers, in several settings from harmless to
destructive, and measures every 30 steps. Beside them: the model before training, and repetition in the pairs' own answers.
About 5 minutes a setting on two cores; results are written after each.
"""

import json
import sys
import tempfile
from pathlib import Path

#: Name, constraint, beta, gamma, reduction, learning rate.
SETTINGS = (
    ("DPO, sums, 1e-3", "none", 0.1, 0.0, "sum", 1e-3),
    ("clip, means, 3e-4", "clip", 2.5, 0.05, "mean", 3e-4),
    ("clip, sums, 3e-4", "clip", 0.1, 1.0, "sum", 3e-4),
    ("clip, sums, 1e-3", "clip", 0.1, 1.0, "sum", 1e-3),
    ("DPO, means, 3e-4", "none", 2.5, 0.0, "mean", 3e-4),
)


def measured(name, constraint, beta, gamma, reduction, rate, *, pairs: str) -> list[dict]:
    """One setting: the price at steps 30 and 60, with the share of held-out pairs preferred."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
    from trl_cpo.data.models import source_of
    from trl_cpo.data.reading import read_pairs
    from trl_cpo.price import meter_of

    train, test = (read_pairs(pairs, split)[0] for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder:
        args = CPOConstrainedConfig(
            folder,
            constraint=constraint,
            beta=beta,
            gamma=gamma,
            logps_reduction=reduction,
            learning_rate=rate,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=256,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            num_train_epochs=1,
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=30,
            save_strategy="no",
            prefix_sharing=True,
            report_to="none",
            disable_tqdm=True,
            seed=42,
        )
        trainer = CPOConstrainedTrainer(
            source_of("demo"),
            args=args,
            train_dataset=train,
            eval_dataset=test,
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0),
        )
        meter, rows = meter_of(trainer, pairs=trainer.eval_dataset, prompts=12, max_new_tokens=48), []

        class Measure(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics=None, **kwargs):
                price = meter.measure(state.global_step)
                rows.append(
                    {
                        "setting": name,
                        "preferred": metrics["eval_cpo/prefers_chosen"],
                        "in_U": metrics["eval_cpo/in_undesirable_region"],
                        **price.to_dict(),
                        "before": {name: part.repetition.to_dict() for name, part in meter.before.items()},
                    }
                )

        trainer.add_callback(Measure())
        trainer.train()
    return rows


def repetition_of_people(pairs: str) -> float:
    """Share of repeated 3-grams in the held-out chosen answers, cut as the model's own are."""
    from transformers import AutoTokenizer

    from trl_cpo.data.models import source_of
    from trl_cpo.data.reading import read_pairs
    from trl_cpo.price import repeated

    tokenizer = AutoTokenizer.from_pretrained(source_of("demo"))
    counts = [
        repeated(tokenizer(row["chosen"][-1]["content"], add_special_tokens=False)["input_ids"][:64])
        for row in read_pairs(pairs, "test")[0]
    ]
    return sum(top for top, _ in counts) / sum(bottom for _, bottom in counts)


def main(file: str, pairs: str = "demo-answers") -> None:
    results = {"repetition_of_people": repetition_of_people(pairs), "runs": []}
    for setting in SETTINGS:
        results["runs"] += measured(*setting, pairs=pairs)
        Path(file).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for row in results["runs"][-2:]:
            parts = {k: (round(v["kl"]["value"], 3), round(v["repetition"]["value"], 3)) for k, v in row["sets"].items()}
            print(setting[0], row["step"], round(row["preferred"], 3), parts, row["seconds"], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
