"""
Searches the demo's recipe: constraints and plain DPO on the embedded decisions, at equal steps, KL and accuracy.

    python -m benchmarks.decisions run --arms start dpo-0.1 clip-1 --out decisions.json
    python -m benchmarks.decisions run --arms clip-1 --options '{"learning_rate": 0.001}' --steps 30 60
    python -m benchmarks.decisions run --arms start clip-1 dpo-0.1 --seeds 43 44 --device cuda --model FOLDER
    python -m benchmarks.decisions table benchmarks/decisions.json

Several processes write to files of their own; `table` takes them together, and `python -m benchmarks.decision_seeds`
compares arms of several seeds at equal KL.

Each run trains the embedded model with LoRA and AdamW, in float32. The learning rate is constant, so that what is measured
after some steps is what a run of so many steps would give; with {"schedule": "linear"} it falls to 0 and only the last step
counts. It has a loop of its own, for speed: the reference is computed once for all arms, and on a CPU the beginning that all
prompts share once a batch, which makes a step two to three times cheaper than the trainer's. On a GPU, where kernels are
what costs, a batch is one forward of whole rows. Targets, losses and clipping of gradients are the trainer's; the order of
the pairs is not.

Measured each time: decisions on the held-out rows (trl_cpo/decisions.py), and on the package's general prompts KL to the
start on the policy's own samples, in nats a token, and the share of repeated 3-grams of greedy answers. Results are added to
the file after each measurement, and name the device.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.data.loading import load_pairs
from trl_cpo.decisions import Decision, _tokens, counts, decide, option_logps
from trl_cpo.engine.precision import float32_products
from trl_cpo.files.atomic import write_json
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps
from trl_cpo.price.meter import PriceMeter
from trl_cpo.price.questions import gather_questions

from .devices import chosen, described

#: Of every arm, unless it or the command says otherwise.
BASE = {"learning_rate": 1e-3, "schedule": "constant", "batch": 4, "target_modules": None, "sft": 0.0}
#: What differs in each arm: the constraint and its fields.
ARMS: dict[str, dict[str, Any]] = {
    "start": {"constraint": "none", "beta": 1.0},
    **{f"dpo-{beta:g}": {"constraint": "none", "beta": beta} for beta in (0.03, 0.1, 0.3, 1.0)},
    **{f"clip-{beta:g}": {"constraint": "clip", "beta": beta, "gamma": 1.0} for beta in (0.1, 0.3, 1.0, 3.0)},
    "clip-1-gamma2": {"constraint": "clip", "beta": 1.0, "gamma": 2.0},
    "clip-1-gamma3": {"constraint": "clip", "beta": 1.0, "gamma": 3.0},
    "softplus-1": {"constraint": "softplus", "beta": 1.0, "gamma": 1.0, "tau": 2.0, "alpha": 1.0},
    "penalty-1": {"constraint": "penalty", "beta": 1.0, "gamma": 1.0, "penalty_weight": 1.0},
    "penalty-0.1-bound": {"constraint": "penalty", "beta": 0.1, "gamma": 1.0, "penalty_weight": 10.0},
}
STEPS = (30, 60, 90)
#: Of a table: KL on general prompts (nats a token) and held-out shares at which arms are compared.
EQUAL_KL = (0.01, 0.02, 0.05)
EQUAL_RIGHT = (0.5, 0.6, 0.7)


def padded_logps(model, tokenizer, rows) -> list[torch.Tensor]:
    """What `option_logps` gives, from one forward of whole rows, padded.

    On a GPU a step is what its kernels take to be started: three small forwards cost more than a large one.
    """
    device = model.get_input_embeddings().weight.device
    batch = [_tokens(tokenizer, row) for row in rows]
    both = [(tokens.prompt, option) for tokens in batch for option in tokens.options]
    width, shortest = max(len(prompt) + len(option) for prompt, option in both), min(len(prompt) for prompt, _ in both)
    # Padded on the right, where causal attention does not look.
    pad, empty = tokenizer.eos_token_id, [0] * (width - shortest)
    ids = [[*prompt, *option, *[pad] * (width - len(prompt) - len(option))] for prompt, option in both]
    real = [empty.copy() for _ in both]
    for mask, (prompt, option) in zip(real, both, strict=True):
        mask[len(prompt) - shortest : len(prompt) - shortest + len(option)] = [1] * len(option)
    given, scored = torch.tensor(ids, device=device), torch.tensor(real, device=device)
    logits = model(input_ids=given, use_cache=False, logits_to_keep=width - shortest + 1).logits[:, :-1]
    picked = logits.float().log_softmax(-1).gather(2, given[:, shortest:, None])[..., 0] * scored
    return list(picked.sum(1).split([len(tokens.options) for tokens in batch]))


class Search:
    """The model, the pairs and the reference's scores, shared by all arms."""

    def __init__(self, model: str, device: torch.device):
        from transformers import AutoTokenizer

        self.device, on_cpu = device, device.type == "cpu"
        self.logps = option_logps if on_cpu else padded_logps
        # Larger batches on a GPU, of 3 GB at most, so that several processes share one.
        self.rows_at_once = 32 if on_cpu else 52
        self.source, self.tokenizer = model, AutoTokenizer.from_pretrained(model)
        self.test = list(load_pairs("demo", "test"))
        # A pair's answers alone: the others are not trained on.
        self.train = [{**row, "options": [row["chosen"], row["rejected"]]} for row in load_pairs("demo", "train")]
        self._reference: list[Decision] | None = None

    def policy(self, target_modules, seed: int):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=target_modules, task_type="CAUSAL_LM")
        # Made on the CPU, so that a seed starts with the same adapter everywhere.
        return get_peft_model(model, lora).to(self.device)

    def reference(self, model) -> list[Decision]:
        """The start's scores of the training pairs; asked before the first step."""
        if self._reference is None:
            self._reference = decide(model, self.tokenizer, self.train, self.rows_at_once)
        return self._reference

    def run(self, arm: str, options: dict[str, Any], seed: int, measured_at, save) -> None:
        """Trains one arm and hands a record to `save` at each of the steps `measured_at`; of "start", at step 0 alone."""
        settings = BASE | ARMS[arm] | options
        began, rows = time.time(), random.Random(seed)
        model = self.policy(settings["target_modules"], seed)
        questions = gather_questions(self.tokenizer, pairs=None, prompts=16, room=None, max_new_tokens=32)
        meter = PriceMeter(model, self.tokenizer, questions, max_new_tokens=32)
        named = {k: v for k, v in settings.items() if k not in (*BASE, "constraint")}
        form = CONSTRAINTS[settings["constraint"]](**named)
        where = {"device": described(self.device), "float32_products": float32_products(self.device.type)}
        record = {"arm": arm, "seed": seed, "settings": settings, **where}
        if arm == "start":
            save({**record, **self.measured(model, meter, 0), "seconds": round(time.time() - began)})
            return
        reference = self.reference(model)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings["learning_rate"], weight_decay=0.0)
        order: list[int] = []
        for step in range(1, max(measured_at) + 1):
            if len(order) < settings["batch"]:
                order = rows.sample(range(len(self.train)), len(self.train))
            batch, order = order[: settings["batch"]], order[settings["batch"] :]
            model.train()
            scores = torch.stack(self.logps(model, self.tokenizer, [self.train[row] for row in batch]))
            starts = torch.tensor([list(reference[row].scores.values()) for row in batch], device=scores.device)
            pairs = PairLogps(scores[:, 0], scores[:, 1], starts[:, 0], starts[:, 1])
            loss = pair_loss(pairs.gap, form.target(pairs), beta=form.beta)
            if (added := form.added_loss(pairs, 0.0)) is not None:
                loss = loss + added
            # As loss_type ["sigmoid", "sft"]: the chosen answers' negative log-likelihood, mean over their tokens.
            if settings["sft"]:
                tokens = sum(len(self.tokenizer(self.train[row]["chosen"])["input_ids"]) + 1 for row in batch)
                loss = loss - settings["sft"] * pairs.policy_chosen.sum() / tokens
            loss.mean().backward()
            if settings["schedule"] == "linear":
                optimizer.param_groups[0]["lr"] = settings["learning_rate"] * (1 - (step - 1) / max(measured_at))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step in measured_at:
                save({**record, **self.measured(model, meter, step), "seconds": round(time.time() - began)})

    def measured(self, model, meter: PriceMeter, step: int) -> dict[str, Any]:
        decisions = decide(model, self.tokenizer, self.test, self.rows_at_once)
        general = meter.measure(step).sets["general"]
        return {
            "step": step,
            "decisions": counts(decisions),
            "outcomes": {name: "".join("01"[each.outcomes[name]] for each in decisions) for name in decisions[0].outcomes},
            "kl_general": general.kl.to_dict(),
            "repetition_general": general.repetition.value,
            "samples": [sample["greedy"] for sample in general.samples[:4]],
        }


def at_level(curve: list[tuple[float, float]], level: float) -> float | None:
    """The second number where the first reaches `level`, between neighbouring points of a curve; None: it does not."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if min(x0, x1) <= level <= max(x0, x1) and x0 != x1:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return None


def name_of(record: dict[str, Any]) -> str:
    """An arm's name, with what the command changed in it."""
    usual = BASE | ARMS[record["arm"]]
    return " ".join([record["arm"], *(f"{k} {v}" for k, v in record["settings"].items() if usual.get(k) != v)])


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: every measurement, then each arm at equal KL and at equal accuracy."""
    head = ("arm", "seed", "steps", "preferred", "right of six", "greedy right", "greedy names one", "KL", "repetition")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    arms: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda each: (name_of(each), each["seed"], each["step"])):
        arms.setdefault((name_of(record), record["seed"]), []).append(record)
        shares = [
            f"{100 * part['share']:.0f} % ({100 * part['low']:.0f} to {100 * part['high']:.0f})"
            for part in (record["decisions"][name] for name in ("preferred", "right", "answered", "named"))
        ]
        cells = (name_of(record), record["seed"], record["step"], *shares, f"{record['kl_general']['value']:.4f}")
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
    runs.add_argument("--options", type=json.loads, default={}, help="settings as JSON, over those of the arms")
    runs.add_argument("--seeds", "--seed", type=int, nargs="+", default=[42])
    runs.add_argument("--model", help="model folder; default: the embedded SmolLM2-135M-Instruct")
    runs.add_argument("--device", help="default: a GPU if there is one")
    runs.add_argument("--out", type=Path, default=Path("decisions.json"), help="JSON file to add to")
    tables = verbs.add_parser("table", help="print what was measured")
    tables.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.verb == "table":
        records = [record for file in options.files for record in json.loads(file.read_text(encoding="utf-8"))]
        print(table(records))
        return
    if options.model is None:
        from trl_cpo.data.demo.model import demo_model_folder

        options.model = str(demo_model_folder())

    def save(record: dict[str, Any]) -> None:
        known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
        write_json(options.out, [*known, record])
        shares = ", ".join(f"{name} {record['decisions'][name]['share']:.2f}" for name in record["outcomes"])
        kl = record["kl_general"]["value"]
        which = f"{name_of(record)}, seed {record['seed']}, step {record['step']}"
        print(f"{which}: {shares}, KL {kl:.4f}, {record['seconds']} s", flush=True)

    search = Search(options.model, chosen(options.device))
    for seed in options.seeds:
        for arm in options.arms:
            search.run(arm, options.options, seed, options.steps, save)


if __name__ == "__main__":
    main()
