"""Decisions of a real model: SmolLM2-135M, all weights for the reference, LoRA for the policy.

Two tasks. In each the reference learnt its decisions from examples of which a slice was decided otherwise than is right today:

routes   messages to one of six teams, the demo's, without its examples. Two of the teams are new: their messages used to go
         to two of the others.
tone     the small model's task: is a text good or bad? Wrong in the examples where the text says "I".

A pair's rejected answer is what used to be said where that is wrong, else one of the other options. Every seed has a reference
of its own.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trl_cpo.data.loading import load_pairs
from trl_cpo.decisions import decide

from . import arms, decisions
from .measures import bits, gaps, kl, sampled
from .once import made
from .small import teach
from .text import Texts, part_of

#: Who got the messages of the teams that are new.
BEFORE = {" Returns": " Shipping", " Account": " Technical"}
VARIANTS = ("routes", "tone")
_TAKEN = (
    *(f"dpo {beta:g}" for beta in (0.1, 0.3, 1.0, 3.0)),
    *(f"clip {beta:g}" for beta in (0.3, 1.0, 3.0)),
    *("bound 0.1", "bound 0.3", "simpo 1", "simpo 2.5", "simpo 10", "penalty 1", "penalty 3", "lagrangian 1"),
    *("softplus 1", "softplus 3", "ipo 0.1", "ipo 0.3", "hinge 0.3", "hinge 1", "sft", "dpo sft 0.3", "clip sft 3"),
)
ARMS: dict[str, dict[str, Any]] = {
    **{arm: decisions.ARMS[arm] for arm in _TAKEN},
    # A third of the rate.
    **{f"dpo slow {beta:g}": {"constraint": "none", "beta": beta, "learning_rate": 3e-5} for beta in (0.1, 0.3, 1.0)},
    **{f"clip slow {beta:g}": {"constraint": "clip", "beta": beta, "gamma": 1.0, "learning_rate": 3e-5} for beta in (1.0, 3.0)},
}


@dataclass(frozen=True)
class Task:
    """Rows of each part, with prompt, right, was (what the reference is taught) and options; and what it is taught."""

    tokenizer: Any
    rows: dict[str, list[dict[str, Any]]]
    taught: list[tuple[str, str]]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.rows, self.taught]).encode()).hexdigest()[:16]

    def pairs(self, seed: int) -> list[dict[str, str]]:
        chance, rows = random.Random(seed), []
        for row in self.rows["train"]:
            other = chance.choice([option for option in row["options"] if option != row["right"]])
            wrong = other if row["was"] == row["right"] else row["was"]
            rows.append({"prompt": row["prompt"], "chosen": row["right"], "rejected": wrong})
        return rows

    def teach(self, model, *, steps: int, learning_rate: float, batch: int, seed: int) -> None:
        rows, end = [], self.tokenizer.eos_token_id
        for prompt, answer in self.taught:
            ids = self.tokenizer(prompt)["input_ids"]
            rows.append(([*ids, *self.tokenizer(answer)["input_ids"], end], len(ids)))
        teach(model, rows, self.tokenizer.pad_token_id, steps=steps, batch=batch, learning_rate=learning_rate, seed=seed)

    def measured(self, policy, reference, general: list[list[int]], seed: int, parts: Sequence[str]) -> dict[str, Any]:
        """Of each part: what is right, P(right), KL a prompt; KL a token on prompts that have nothing to do with it."""
        pad, found = self.tokenizer.pad_token_id, {}
        for part in parts:
            rows = self.rows[part]
            asked = [
                {"prompt": r["prompt"], "chosen": r["right"], "rejected": _other(r), "options": r["options"]} for r in rows
            ]
            told = decide(policy, self.tokenizer, asked, batch_size=64)
            hits = torch.tensor([each.outcomes["right"] for each in told])
            at_right = torch.tensor([each.scores[each.chosen] for each in told])
            changed = torch.tensor([row["was"] != row["right"] for row in rows])
            prompts = [self.tokenizer(row["prompt"])["input_ids"] for row in rows]
            longest = max(len(self.tokenizer(option)["input_ids"]) for option in rows[0]["options"])
            answers = sampled(policy, prompts, self.tokenizer, longest + 1, seed)
            sums, _ = kl(policy, reference, prompts, answers, pad)
            shares = {
                "right": hits,
                "right_slice": hits[changed],
                "right_elsewhere": hits[~changed],
                "greedy_right": torch.tensor([each.outcomes["answered"] for each in told]),
                "p_right": at_right.exp(),
                "logp_right": at_right,
                "kl": sums,
            }
            found[part] = {name: round(values.float().mean().item(), 5) for name, values in shares.items()}
            found[part]["hits"] = bits(hits)
        answers = sampled(policy, general, self.tokenizer, 32, seed)
        sums, tokens = kl(policy, reference, general, answers, pad)
        return {**found, "kl_general": round((sums.sum() / tokens.sum()).item(), 5)}

    def reference_gaps(self, reference, rows: list[dict[str, str]]) -> torch.Tensor:
        """δ_ref of some pairs, sums in nats."""
        return gaps(reference, self.tokenizer, rows, 64)[0]


def _other(row: dict[str, Any]) -> str:
    return row["was"] if row["was"] != row["right"] else next(each for each in row["options"] if each != row["right"])


def routes(tokenizer) -> Task:
    """The demo's messages: of its training ones eight in ten for pairs, the rest for validation; its test set is the test."""
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for split in ("train", "test"):
        for row in load_pairs("demo", split):
            teams, *_, message = row["prompt"].splitlines()
            part = split if split == "test" or part_of(message) == "train" else "validation"
            right, options = row["chosen"], row["options"]
            prompt = f"{teams}\n{message}"
            parts[part].append({"prompt": prompt, "right": right, "was": BEFORE.get(right, right), "options": options})
    return Task(tokenizer, parts, [(row["prompt"], row["was"]) for row in parts["train"]])


def tone(tokenizer, texts: Texts, *, pairs: int, prompts: int) -> Task:
    """The small model's decisions of one token and two options."""
    small = decisions.Task(texts, tokenizer, "1 token", pairs=pairs, prompts=prompts)

    def asked(turn: str) -> dict[str, Any]:
        right = small.label[turn]
        was = small.words[right ^ decisions.misled(turn)]
        return {"prompt": small.prompt(turn), "right": small.words[right], "was": was, "options": small.words}

    rows = {part: [asked(turn) for turn in turns] for part, turns in small.parts.items()}
    return Task(tokenizer, rows, [(row["prompt"], row["was"]) for row in map(asked, small.pieces)])


def reference_folder(work: Path, base: Path, task: Task, variant: str, *, seed: int, **taught: Any) -> Path:
    """The reference of a variant and seed, made once."""
    from transformers import AutoModelForCausalLM

    def make(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base).to(arms.device())
        task.teach(model, seed=seed, **taught)
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)

    return made(work / f"larger-{variant}-{seed}", make)
