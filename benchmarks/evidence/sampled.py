"""Sampled answers: two of the reference's to each question, labelled by a known reward, which scores the policy's own too.

The reward is VADER's score of the answer, −1 to 1. "noiseless" labels choose the higher score; "bradley-terry" labels choose
the first answer with probability σ(4 Δr).
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from . import arms
from .decisions import _scores, parts_of
from .measures import gaps, kl, sampled
from .once import made
from .text import Texts

SCALE_OF_LABELS = 4.0
_MEANS: dict[str, Any] = {"loss_type": ["sigmoid_norm"], "logps_reduction": "mean"}
ARMS: dict[str, dict[str, Any]] = {
    **{f"dpo {beta:g}": {"constraint": "none", "beta": beta} for beta in (0.03, 0.1, 0.3)},
    **{f"ipo {beta:g}": {"constraint": "none", "beta": beta, "loss_type": ["ipo"]} for beta in (0.03, 0.1, 0.3)},
    **{f"clip {beta:g}": {"constraint": "clip", "beta": beta, "gamma": 2.0} for beta in (0.03, 0.1, 0.3, 1.0)},
    "clip 0.1 reach 10": {"constraint": "clip", "beta": 0.1, "gamma": 2.0, "reach": 10.0},
    "penalty 0.1": {"constraint": "penalty", "beta": 0.1, "gamma": 2.0, "penalty_weight": 0.1},
    "lagrangian 0.1": {"constraint": "lagrangian", "beta": 0.1, "gamma": 2.0, "epsilon": 0.5},
    **{f"dpo means {beta:g}": {"constraint": "none", "beta": beta, **_MEANS} for beta in (1.0, 2.5)},
    **{f"clip means {beta:g}": {"constraint": "clip", "beta": beta, "gamma": 0.05, **_MEANS} for beta in (1.0, 2.5)},
}


def prompt(question: str) -> str:
    return f"Human: {question}\nAssistant:"


class Task:
    """Pairs of sampled answers with their scores, made once and kept; questions of the other parts."""

    def __init__(
        self, work: Path, base: Path, tokenizer, texts: Texts, *, questions: int, held_out: int, new: int, trial: bool = False
    ):
        self.tokenizer, self.new, self.base, self.trial = tokenizer, new, base, trial
        asked = {part: list(dict.fromkeys(question for question, _ in found)) for part, found in texts.exchanges.items()}
        self.questions = {part: found[:held_out] for part, found in asked.items()}
        wanted = {part: found[: questions if part == "train" else held_out] for part, found in asked.items()}

        def make(file: Path) -> None:
            file.write_text(json.dumps({part: self._pairs(found) for part, found in wanted.items()}))

        self.found: dict[str, list[dict[str, Any]]] = json.loads(made(work / "sampled-pairs.json", make).read_text())

    def _pairs(self, questions: list[str]) -> list[dict[str, Any]]:
        """Two answers a question, both ended, with unlike scores; the better one first."""
        ids = [self.tokenizer(prompt(question))["input_ids"] for question in questions]
        base = AutoModelForCausalLM.from_pretrained(self.base).eval()
        answers = [sampled(base, ids, self.tokenizer, self.new, seed) for seed in (1, 2)]
        texts = [[self.tokenizer.decode(a, skip_special_tokens=True) for a in side] for side in answers]
        score, rows = self.scores([text for side in texts for text in side]), []
        for question, one, other, *ids_ in zip(questions, *texts, *answers, strict=True):
            ended = all(each[-1] == self.tokenizer.eos_token_id and len(each) > 1 for each in ids_)
            if (ended or self.trial) and score[one] != score[other]:
                better, worse = (one, other) if score[one] > score[other] else (other, one)
                row = {"prompt": prompt(question), "chosen": better, "rejected": worse}
                rows.append({**row, "reward_gap": score[better] - score[worse]})
        return rows

    def scores(self, texts: list[str]) -> dict[str, float]:
        """The reward of each text; of a trial, whose model writes no words, the share of vowels."""
        return {text: sum(text.count(v) for v in "aeiou") / (1 + len(text)) for text in texts} if self.trial else _scores(texts)

    def pairs(self, labels: str, seed: int) -> list[dict[str, str]]:
        chance, rows = random.Random(seed), []
        for row in self.found["train"]:
            sides = row["chosen"], row["rejected"]
            p = torch.sigmoid(torch.tensor(SCALE_OF_LABELS * row["reward_gap"])).item()
            if labels == "bradley-terry" and chance.random() > p:
                sides = sides[::-1]
            rows.append({"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1]})
        return rows

    def measured(self, policy, reference, seed: int, parts: Sequence[str]) -> dict[str, Any]:
        """Reward, KL, length and entropy of the policy's own answers; held-out pairs that it prefers."""
        pad, found = self.tokenizer.pad_token_id, {}
        for part in parts:
            ids = [self.tokenizer(prompt(question))["input_ids"] for question in self.questions[part]]
            answers = sampled(policy, ids, self.tokenizer, self.new, 100 + seed)
            texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
            score = self.scores(texts)
            rewards = torch.tensor([score[text] for text in texts])
            sums, tokens = kl(policy, reference, ids, answers, pad)
            found[part] = {
                "reward": round(rewards.mean().item(), 4),
                "error": round((rewards.std() / len(rewards) ** 0.5).item(), 4),
                "kl": round(sums.mean().item(), 4),
                "tokens": round(tokens.float().mean().item(), 2),
                "ended": round(sum(a[-1] == self.tokenizer.eos_token_id for a in answers) / len(answers), 4),
                "preferred": round((gaps(policy, self.tokenizer, self.found[part])[0] > 0).float().mean().item(), 4),
            }
        return found

    def reference_gaps(self, reference) -> dict[str, Any]:
        """What of δ_ref length and the reward explain, over training pairs."""
        rows = self.found["train"][:1000]
        found, _ = gaps(reference, self.tokenizer, rows)
        longer = torch.tensor(
            [float(_length(self.tokenizer, r["chosen"]) - _length(self.tokenizer, r["rejected"])) for r in rows]
        )
        reward = torch.tensor([row["reward_gap"] for row in rows])
        told = {"mean": found.mean(), "deviation": found.std(), "misaligned": (found < 0).float().mean()}
        told |= {
            f"r2_{name}": torch.corrcoef(torch.stack([found, each]))[0, 1] ** 2
            for name, each in (("length", longer), ("reward", reward))
        }
        return {"pairs": len(self.found["train"]), **{name: round(value.item(), 4) for name, value in told.items()}}


def _length(tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def run(arm: str, labels: str, task: Task, reference_at: Path, *, scale: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains one arm; its curve."""
    reference = AutoModelForCausalLM.from_pretrained(reference_at).eval().to(arms.device())
    curve = []

    def measure(step: int, policy) -> None:
        curve.append({"step": step, **task.measured(policy, reference, seed, parts_of(seed, arm))})

    if arm == "start":
        measure(0, reference)
        return {"curve": curve, "ref_gap": task.reference_gaps(reference)}
    rows = task.pairs(labels, seed)
    arms.train(ARMS[arm], str(reference_at), task.tokenizer, rows, seed=seed, measure=measure, **scale)
    return {"curve": curve}
