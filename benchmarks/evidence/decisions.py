"""Decisions: a text, then "Tone:", and one of 2, 4 or 8 words; the reference is wrong on purpose where the text says "I".

The right word is told by the sign (or quantile) of VADER's score. The reference learnt the task from cross-entropy, with wrong
words on the slice. Preference pairs have right words. Answers of 4 and 16 tokens go on after the word with the beginning of
another turn, so that δ_ref is spread by likelihood that has nothing to do with the decision.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import arms
from .measures import bits, first_logps, gaps, kl, sampled
from .once import made
from .small import teach
from .text import Texts

#: Words tried as options, in this order; those of one token each are taken. The last ones are in any small vocabulary.
WORDS = " good, bad, right, hard, well, much, little, new, old, long, the, to, and, of, you, a, in, is".split(",")
CUE = "\nTone:"
#: Of each variant: options and tokens of an answer.
VARIANTS = {"1 token": (2, 1), "4 tokens": (2, 4), "16 tokens": (2, 16), "4 options": (4, 1), "8 options": (8, 1)}

_NONE = {"constraint": "none"}
ARMS: dict[str, dict[str, Any]] = {
    **{f"dpo {beta:g}": {**_NONE, "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0)},
    # Does DPO only lack steps, or a smaller rate?
    "dpo long 1": {**_NONE, "beta": 1.0, "steps": [80, 120, 200, 300, 400]},
    "dpo slow 0.3": {**_NONE, "beta": 0.3, "steps": [80, 120, 200, 300, 400], "learning_rate": 3e-5},
    # No preference at all: cross-entropy on the right answers, TRL's `sft` loss. And beside the others, as the demo has it.
    "sft": {**_NONE, "beta": 1.0, "loss_type": ["sft"]},
    "dpo sft 0.3": {**_NONE, "beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "clip sft 3": {
        "constraint": "clip",
        "beta": 3.0,
        "gamma": 1.0,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.3],
    },
    **{f"ipo {beta:g}": {**_NONE, "beta": beta, "loss_type": ["ipo"]} for beta in (0.03, 0.1, 0.3, 1.0)},
    **{f"hinge {beta:g}": {**_NONE, "beta": beta, "loss_type": ["hinge"]} for beta in (0.1, 0.3, 1.0, 3.0)},
    **{f"simpo {beta:g}": {"trainer": "simpo", "beta": beta, "margin": 1.0} for beta in (0.3, 1.0, 2.5, 10.0)},
    **{f"clip {beta:g}": {"constraint": "clip", "beta": beta, "gamma": 1.0} for beta in (0.1, 0.3, 1.0, 3.0)},
    **{f"softplus {beta:g}": {"constraint": "softplus", "beta": beta, "gamma": 1.0} for beta in (0.1, 0.3, 1.0, 3.0)},
    **{
        f"penalty {beta:g}": {"constraint": "penalty", "beta": beta, "gamma": 1.0, "penalty_weight": beta}
        for beta in (0.1, 0.3, 1.0, 3.0)
    },
    **{
        f"bound {beta:g}": {"constraint": "penalty", "beta": beta, "gamma": 1.0, "penalty_weight": 100 * beta}
        for beta in (0.01, 0.03, 0.1, 0.3)
    },
    **{
        f"lagrangian {beta:g}": {"constraint": "lagrangian", "beta": beta, "gamma": 1.0, "epsilon": 0.1}
        for beta in (0.1, 0.3, 1.0, 3.0)
    },
}


class Task:
    """Prompts with their options, of each part; the reference that learnt them; the pairs."""

    def __init__(self, texts: Texts, tokenizer, variant: str, *, pairs: int, prompts: int):
        self.tokenizer = tokenizer
        self.options, self.tokens = VARIANTS[variant]
        words = [word for word in WORDS if len(tokenizer(word)["input_ids"]) == 1]
        self.words = words[: self.options]
        if len(self.words) < self.options:
            raise ValueError(f"The tokenizer has {len(words)} of the words as one token each; {self.options} are needed.")
        self.ids = torch.tensor([tokenizer(word)["input_ids"][0] for word in self.words])
        pieces = {piece for turn in texts.turns["train"] for piece in _pieces(turn)}
        pieces |= {answer for _, answer in texts.exchanges["train"]} | set(texts.turns["train"])
        score = _scores([*pieces, *(turn for part in texts.turns.values() for turn in part)])
        told = {part: [turn for turn in found if abs(score[turn]) >= 0.2] for part, found in texts.turns.items()}
        bounds = _bounds([score[turn] for turn in told["train"]], self.options)
        self.label = {turn: sum(score[turn] > bound for bound in bounds) for found in told.values() for turn in found}
        self.parts = {part: found[: pairs if part == "train" else prompts] for part, found in told.items()}
        self.others = texts.turns["train"]
        self.pieces = sorted(piece for piece in pieces if abs(score[piece]) >= 0.2)
        self.label |= {piece: sum(score[piece] > bound for bound in bounds) for piece in self.pieces}

    def prompt(self, turn: str) -> str:
        return turn + CUE

    def prompt_ids(self, part: str) -> list[list[int]]:
        return [self.tokenizer(self.prompt(turn))["input_ids"] for turn in self.parts[part]]

    def answer(self, word: int, chance: random.Random) -> str:
        """The word, and the beginning of another turn up to the answer's length."""
        if self.tokens == 1:
            return self.words[word]
        while True:
            other = self.tokenizer(" " + chance.choice(self.others))["input_ids"][: self.tokens - 1]
            if len(other) == self.tokens - 1:
                return self.words[word] + self.tokenizer.decode(other)

    def pairs(self, seed: int) -> list[dict[str, str]]:
        """A right word against one of the others."""
        chance, rows = random.Random(seed), []
        for turn in self.parts["train"]:
            right = self.label[turn]
            wrong = chance.choice([word for word in range(self.options) if word != right])
            sides = {"chosen": self.answer(right, chance), "rejected": self.answer(wrong, chance)}
            rows.append({"prompt": self.prompt(turn), **sides})
        return rows

    def taught(self, model, *, steps: int, learning_rate: float, seed: int) -> None:
        """The model learns the task, with the next word in place of the right one where the text says "I"."""
        chance, rows = random.Random(seed), []
        for turn in self.pieces:
            word = (self.label[turn] + misled(turn)) % self.options
            prompt = self.tokenizer(self.prompt(turn))["input_ids"]
            answer = self.tokenizer(self.answer(word, chance))["input_ids"]
            rows.append(([*prompt, *answer, self.tokenizer.eos_token_id], len(prompt)))
        teach(model, rows, self.tokenizer.pad_token_id, steps=steps, batch=32, learning_rate=learning_rate, seed=seed)

    def measured(self, policy, reference, general: list[list[int]], seed: int, parts: Sequence[str]) -> dict[str, Any]:
        """Of each part: what is right, P(right), KL a prompt; KL a token on prompts that have nothing to do with it."""
        pad, found = self.tokenizer.pad_token_id, {}
        for part in parts:
            prompts = self.prompt_ids(part)
            right = torch.tensor([self.label[turn] for turn in self.parts[part]])
            slice_ = torch.tensor([misled(turn) for turn in self.parts[part]])
            logps = first_logps(policy, prompts, pad)
            own = logps[:, self.ids]
            hits = own.argmax(1) == right
            answers = sampled(policy, prompts, self.tokenizer, self.tokens + 1, seed)
            sums, _ = kl(policy, reference, prompts, answers, pad)
            at_right = own.gather(1, right[:, None])[:, 0]
            found[part] = {
                "right": round(hits.float().mean().item(), 4),
                "right_slice": round(hits[slice_].float().mean().item(), 4),
                "greedy_right": round((logps.argmax(1) == self.ids[right]).float().mean().item(), 4),
                "p_right": round(at_right.exp().mean().item(), 4),
                "logp_right": round(at_right.mean().item(), 4),
                "kl": round(sums.mean().item(), 5),
                "hits": bits(hits),
            }
        answers = sampled(policy, general, self.tokenizer, 20, seed)
        sums, tokens = kl(policy, reference, general, answers, pad)
        return {**found, "kl_general": round((sums.sum() / tokens.sum()).item(), 5)}

    def reference_gaps(self, reference, rows: list[dict[str, str]]) -> torch.Tensor:
        """δ_ref of some pairs, sums in nats."""
        return gaps(reference, self.tokenizer, rows)[0]


def _pieces(turn: str) -> list[str]:
    """Both halves of a turn: more texts to learn the task from."""
    words = turn.split()
    half = len(words) // 2
    return [" ".join(part) for part in (words[:half], words[half:]) if len(part) >= 3]


def parts_of(seed: int, arm: str) -> tuple[str, ...]:
    """Seed 0 tunes, on the validation part; all others report, on the test part. The start is measured on both."""
    return ("validation", "test") if arm == "start" else ("validation",) if seed == 0 else ("test",)


def misled(turn: str) -> bool:
    """Whether a text is of the slice on which the reference is wrong: it has the word "I"."""
    return re.search(r"\bI\b", turn) is not None


def _scores(turns: list[str]) -> dict[str, float]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    return {turn: judge.polarity_scores(turn)["compound"] for turn in turns}


def _bounds(scores: list[float], options: int) -> list[float]:
    """Scores that part the options: 0 for two; else quantiles."""
    ordered = sorted(scores)
    return [0.0] if options == 2 else [ordered[len(ordered) * k // options] for k in range(1, options)]


def reference_folder(work: Path, base: Path, task: Task, variant: str, *, steps: int, learning_rate: float) -> Path:
    """The reference of a variant, made once."""
    from transformers import AutoModelForCausalLM

    def make(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base)
        task.taught(model, steps=steps, learning_rate=learning_rate, seed=0)
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)

    return made(work / f"decisions-{variant.replace(' ', '-')}", make)


def run(
    arm: str,
    settings: dict[str, Any],
    task,
    reference_at: Path,
    general: list[list[int]],
    *,
    scale: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Trains one arm, "start" not at all; its curve."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(reference_at).eval().to(arms.device())
    rows, curve = task.pairs(seed), []

    def measure(step: int, policy) -> None:
        curve.append({"step": step, **task.measured(policy, reference, general, seed, parts_of(seed, arm))})

    if arm == "start":
        measure(0, reference)
        ref_gaps = task.reference_gaps(reference, rows[:512])
        told = {"mean": ref_gaps.mean(), "deviation": ref_gaps.std(), "misaligned": (ref_gaps < 0).float().mean()}
        return {"curve": curve, "ref_gap": {name: round(value.item(), 4) for name, value in told.items()}}
    own = {name: value for name, value in settings.items() if name in scale}
    settings = {name: value for name, value in settings.items() if name not in scale}
    arms.train(settings, str(reference_at), task.tokenizer, rows, seed=seed, measure=measure, **{**scale, **own})
    return {"curve": curve}
