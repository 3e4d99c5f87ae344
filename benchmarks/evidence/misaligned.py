"""References misaligned on purpose: real pairs, a share R of them with the labels turned round, then every method on the labels
as they are. The setting of Fig. 2 of arXiv 2605.20834, on a small model.

The reference is the language model after DPO on the pairs with R of the labels turned round. Of the training pairs it then
prefers about R the wrong way round. The region U, escapes and preference are those of the training pairs; preference and KL
are measured on held-out pairs and questions too.
"""

import random
from pathlib import Path
from typing import Any

import torch

from trl_cpo.data.loading import load_pairs

from . import arms
from .measures import gaps, kl, sampled
from .once import made
from .text import exchange_of, part_of

SHARES = {"R 0.2": 0.2, "R 0.3": 0.3, "R 0.4": 0.4}
ARMS: dict[str, dict[str, Any]] = {
    "dpo 0.1": {"constraint": "none", "beta": 0.1},
    "dpo 1": {"constraint": "none", "beta": 1.0},
    "clip 0.1": {"constraint": "clip", "beta": 0.1, "gamma": 1.0},
    "clip 1": {"constraint": "clip", "beta": 1.0, "gamma": 1.0},
    "softplus 0.1": {"constraint": "softplus", "beta": 0.1, "gamma": 1.0},
    "penalty 0.1": {"constraint": "penalty", "beta": 0.1, "gamma": 1.0, "penalty_weight": 0.1},
}


def read_pairs(source: str, longest: int) -> dict[str, list[dict[str, str]]]:
    """The last exchange of each pair of dialogues, by part, where both answers have a sentence that fits and differ."""
    found: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in load_pairs(source):
        sides = [exchange_of(row[side], longest) for side in ("chosen", "rejected")]
        if None in sides or sides[0][1] == sides[1][1] or sides[0][0] != sides[1][0]:
            continue
        prompt = f"Human: {sides[0][0]}\nAssistant:"
        found[part_of(sides[0][0])].append({"prompt": prompt, "chosen": " " + sides[0][1], "rejected": " " + sides[1][1]})
    return found


class Task:
    """The pairs, and the reference of a share and a seed."""

    def __init__(self, pairs: dict[str, list[dict[str, str]]], tokenizer, *, pairs_used: int, new: int):
        self.tokenizer, self.new = tokenizer, new
        self.pairs = {**pairs, "train": pairs["train"][:pairs_used]}
        self.held_out = pairs["validation"] + pairs["test"]

    def turned(self, share: float, seed: int) -> list[dict[str, str]]:
        """The training pairs with a share of the labels turned round."""
        chance = random.Random(seed)
        wrong = set(chance.sample(range(len(self.pairs["train"])), round(share * len(self.pairs["train"]))))
        sides = {"chosen": "rejected", "rejected": "chosen", "prompt": "prompt"}
        return [{name: row[sides[name]] for name in row} if at in wrong else row for at, row in enumerate(self.pairs["train"])]

    def measured(self, policy, reference, ref_gaps: torch.Tensor, seed: int) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        own, _ = gaps(policy, self.tokenizer, self.pairs["train"])
        held_out, _ = gaps(policy, self.tokenizer, self.held_out)
        ids = [self.tokenizer(row["prompt"])["input_ids"] for row in self.held_out]
        answers = sampled(policy, ids, self.tokenizer, self.new, 100 + seed)
        sums, _ = kl(policy, reference, ids, answers, pad)
        misaligned = ref_gaps < 0
        found = {
            "in_u": (misaligned & (own < 0) & (own > ref_gaps)).float().mean(),
            "escaped": (misaligned & (own > 0)).float().mean(),
            "wrong": (own < 0).float().mean(),
            "preferred": (own > 0).float().mean(),
            "held_out": (held_out > 0).float().mean(),
            "kl": sums.mean(),
        }
        return {name: round(value.item(), 4) for name, value in found.items()}


def reference_folder(work: Path, base: Path, task: Task, variant: str, *, steps: int, learning_rate: float, seed: int) -> Path:
    """The misaligned reference of a share and seed, made once."""

    def make(folder: Path) -> None:
        def keep(step: int, model) -> None:
            model.save_pretrained(folder)
            task.tokenizer.save_pretrained(folder)

        rows, dpo = task.turned(SHARES[variant], seed), {"constraint": "none", "beta": 0.1}
        scale = {"batch": 32, "learning_rate": learning_rate, "steps": [steps]}
        arms.train(dpo, str(base), task.tokenizer, rows, seed=1000 + seed, measure=keep, **scale)

    return made(work / f"misaligned-{SHARES[variant]:g}-{seed}", make)


def run(arm: str, task: Task, reference_at: Path, *, scale: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains one arm; its curve."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(reference_at).eval().to(arms.device())
    (ref_gaps, _), curve = gaps(reference, task.tokenizer, task.pairs["train"]), []

    def measure(step: int, policy) -> None:
        curve.append({"step": step, "test": task.measured(policy, reference, ref_gaps, seed)})

    if arm == "start":
        measure(0, reference)
        told = {"mean": ref_gaps.mean(), "deviation": ref_gaps.std(), "misaligned": (ref_gaps < 0).float().mean()}
        return {"curve": curve, "ref_gap": {name: round(value.item(), 4) for name, value in told.items()}}
    arms.train(ARMS[arm], str(reference_at), task.tokenizer, task.pairs["train"], seed=seed, measure=measure, **scale)
    return {"curve": curve}
