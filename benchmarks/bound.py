"""
Compares a bound on the violation with penalties of fixed weight, on the embedded model and long answers.

    python -m benchmarks.bound --epsilon 5 10 20 --penalty 0.01 0.1 1 --out bound.json
    python -m benchmarks.bound --votes 5 --penalty 0 0.1 --epsilon 5 10 --out bound-votes.json
    python -m benchmarks.bound --table bound-votes.json

Each run trains with LoRA, β 0.1, γ 1, learning rate 1e-3. Measured at the final weights: the mean violation over all training
pairs, which the bound limits, and over the held-out pairs; and the KL divergence, the mean over held-out prompts of
Σ_t KL(π_θ ‖ π_ref) along a response of up to 48 tokens sampled from the policy.

With --votes, labels are soft: votes of simulated annotators (`benchmarks.votes`) give p by the package's own count. A
violation then weighs 2p − 1, and the bound is on the mean of those. Runs that the file has already are left out.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.data.loading import load_pairs, to_conversational
from trl_cpo.data.votes import PROBABILITY

from .votes import voted

RESPONSE_TOKENS = 48


def trained(
    model: str, train, test, epochs: float, seed: int, target_modules: str | None = None, **options
) -> CPOConstrainedTrainer:
    """A trainer after training with LoRA, β 0.1 and γ 1; `options`, such as the constraint, override the rest."""
    recipe = dict(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=256,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=epochs,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        beta=0.1,
        gamma=1.0,
        seed=seed,
        prefix_sharing=True,
        dataloader_pin_memory=False,
    )
    args = CPOConstrainedConfig(**recipe | options)
    trainer = CPOConstrainedTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=train,
        eval_dataset={"train": train, "test": test},
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=target_modules, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


def tokens_of(tokenizer, prompts) -> dict[str, torch.Tensor]:
    """The tokenized prompts, padded on the left, so that every response begins right after its prompt."""
    # apply_chat_template ignores a padding_side argument, so set it on the tokenizer.
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        return tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
    finally:
        tokenizer.padding_side = side


@torch.no_grad()
def kl_paid(trainer: CPOConstrainedTrainer, prompts, seed: int = 0, batch: int = 20) -> float:
    """Mean over prompts of Σ_t KL(π_θ ‖ π_ref) along one response sampled from the policy, nats."""
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    torch.manual_seed(seed)
    total, count = 0.0, 0
    for start in range(0, len(prompts), batch):
        inputs = tokens_of(tokenizer, prompts[start : start + batch])
        tokens = model.generate(**inputs, max_new_tokens=RESPONSE_TOKENS, do_sample=True, top_k=0, top_p=1.0)
        answer = tokens[:, inputs["input_ids"].size(1) :]
        ended = (answer == tokenizer.eos_token_id).cumsum(1)
        kept = (ended - (answer == tokenizer.eos_token_id).long()) == 0  # the end token counts as part of the response
        mask = torch.cat([inputs["attention_mask"], kept.long()], dim=1)
        first = inputs["input_ids"].size(1) - 1

        def log_probs(tokens=tokens, mask=mask, first=first):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
            return logits[:, first:-1].log_softmax(-1)

        policy = log_probs()
        with model.disable_adapter():
            reference = log_probs()
        divergence = (policy.exp() * (policy - reference)).sum(-1)
        total += (divergence * kept).sum().item()
        count += len(tokens)
    return total / count


def weighed_violation(trainer: CPOConstrainedTrainer, split: str, probabilities) -> float:
    """The mean over a split's evaluated pairs of (2p − 1) max(0, γ − δ_θ), nats: what a bound limits with soft labels."""
    gaps = trainer.evaluated_pairs[f"eval_{split}"].gap
    certainty = (2 * torch.tensor(probabilities) - 1).clamp(min=0)
    return (certainty * (trainer.args.gamma - gaps).clamp(min=0)).mean().item()


def curve(history, epsilon: float | None) -> list[dict[str, float]]:
    """Of each logged step: the violation, not weighed; of a multiplier also λ, and the violation that moved it."""
    points = []
    for log in history:
        if "cpo/violation" not in log:
            continue
        point = {"step": log["step"], "violation": log["cpo/violation"]}
        if "cpo/lambda" in log:
            point |= {"lambda": log["cpo/lambda"], "bounded": epsilon - log["cpo/slack"]}
        points.append({name: round(value, 5) for name, value in point.items()})
    return points


def measured(trainer: CPOConstrainedTrainer, sets: dict[str, Any]) -> dict[str, Any]:
    """The measurements of a trained run, by name; `sets` are its pairs, `train` and `test`."""
    logs = trainer.evaluate()
    record: dict[str, Any] = {
        f"{split}_{name}": logs[f"eval_{split}_cpo/{name}"]
        for split in sets
        for name in ("violation", "violation_rate", "prefers_chosen", "in_undesirable_region", "gap")
    }
    for split, pairs in sets.items():
        if PROBABILITY in pairs.column_names:
            record[f"{split}_weighed_violation"] = weighed_violation(trainer, split, pairs[PROBABILITY])
    record["kl"] = kl_paid(trainer, sets["test"]["prompt"])
    record["curve"] = curve(trainer.state.log_history, trainer.args.epsilon)
    return record


#: Of runs with soft labels. Violations are weighed, in mean nats, of the training pairs at the final weights or of the steps
#: of the second half as they were drawn; λ is of that half.
HEAD = ("", "ε asked", "at the end", "second half", "held out", "not weighed", "KL", "λ, second half", "λ at the end")


def row(record: dict[str, Any]) -> str:
    """A run's cells, under `HEAD`; what a run without a multiplier does not log stays empty."""
    settings, late = record["settings"], record["curve"][len(record["curve"]) // 2 :]
    name = settings["constraint"]
    if name == "penalty":
        name += f" {settings['penalty_weight']:g}"
    cells = [name, f"{settings['epsilon']:g}" if "epsilon" in settings else "", f"{record['train_weighed_violation']:.1f}"]
    bounded, multipliers = ([point[key] for point in late if key in point] for key in ("bounded", "lambda"))
    cells.append(f"{sum(bounded) / len(bounded):.1f}" if bounded else "")
    cells += [f"{record['test_weighed_violation']:.1f}", f"{record['train_violation']:.1f}", f"{record['kl']:.1f}"]
    cells += [f"{min(multipliers):.3f} to {max(multipliers):.3f}", f"{multipliers[-1]:.3f}"] if multipliers else ["", ""]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bound", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="model folder; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--epsilon", type=float, nargs="*", default=[], help="bounds on the mean violation, nats")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="bounds on the fraction of violating pairs")
    parser.add_argument("--penalty", type=float, nargs="*", default=[], help="fixed weights; 0 is plain DPO")
    parser.add_argument("--votes", type=int, default=0, help="simulated annotators of each pair, for soft labels; 0: none")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--options", type=json.loads, default={}, help="config fields as JSON; they override the recipe")
    parser.add_argument("--out", default="bound.json", help="JSON file to add to")
    parser.add_argument("--table", type=Path, help="print the runs with soft labels of such a file, and train nothing")
    options = parser.parse_args()
    if options.table is not None:
        print(f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), sep="\n")
        for record in json.loads(options.table.read_text(encoding="utf-8")):
            print(f"| {row(record)} |")
        return
    if options.model is None:
        from trl_cpo.data.demo.model import demo_model_folder

        options.model = str(demo_model_folder())
    settings: dict[str, Any] = {"epochs": options.epochs, "seed": options.seed}
    sets = {split: to_conversational(load_pairs("demo-answers", split))[0] for split in ("train", "test")}
    counted: dict[str, Any] = {}
    if options.votes:
        for seed, (split, pairs) in enumerate(sets.items()):
            sets[split], counted[split] = voted(pairs, options.votes, seed)
        settings["probability_column"] = PROBABILITY
    runs: list[dict[str, Any]] = [{"constraint": "penalty" if w else "none", "penalty_weight": w} for w in options.penalty]
    runs += [{"constraint": "lagrangian", "epsilon": epsilon} for epsilon in options.epsilon]
    runs += [{"constraint": "lagrangian", "epsilon": e, "dual_signal": "violation_rate"} for e in options.rate]
    out = Path(options.out)
    records = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    for run in runs:
        asked = settings | run | options.options
        about = {"settings": asked, **({"votes": counted} if counted else {})}
        if any(about == {name: record.get(name) for name in about} for record in records):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = trained(options.model, sets["train"], sets["test"], **asked)
            record = about | measured(trainer, sets)
        records.append(record)
        out.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n", encoding="utf-8")
        weighed = f" (weighed {record['train_weighed_violation']:.2f})" if "train_weighed_violation" in record else ""
        print(
            f"{run}: violation {record['train_violation']:.2f} train{weighed}, {record['test_violation']:.2f} held out; rate "
            f"{record['train_violation_rate']:.3f}; KL {record['kl']:.2f}; λ {record['curve'][-1].get('lambda', '')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
