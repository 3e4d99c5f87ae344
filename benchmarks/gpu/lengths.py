"""Pairs of random tokens whose lengths are those of real pairs, or of made-up ones that are never the same twice."""

import json
import random
from pathlib import Path

#: Prompt, chosen and rejected tokens of the first 600 pairs of HH-RLHF harmless-base test under SmolLM2's tokenizer and
#: template, cut to 512 tokens a row as DPOTrainer cuts them: (the lengths alone).
HH_FILE = Path(__file__).with_name("hh_lengths.json")

Lengths = tuple[int, int, int]


def hh_lengths(count: int, start: int = 0) -> list[Lengths]:
    """`count` of them, from `start` on, round and round, in an order shuffled once."""
    lengths = [tuple(row) for row in json.loads(HH_FILE.read_text())]
    random.Random(0).shuffle(lengths)
    return [lengths[(start + i) % len(lengths)] for i in range(count)]


def near(prompt: int, answer: int, count: int, seed: int, spread: float = 0.1) -> list[Lengths]:
    """`count` pairs of about these lengths, off by up to a share `spread`."""
    rng = random.Random(f"{prompt} {answer} {seed}")

    def off(length: int) -> int:
        return max(1, round(length * (1 + spread * rng.uniform(-1, 1))))

    return [(off(prompt), off(answer), off(answer)) for _ in range(count)]


def tokens_of(lengths: list[Lengths], vocabulary: int, seed: int = 0) -> list[dict]:
    """Pairs of random tokens of these lengths, as DPOTrainer's collator takes them, with made-up reference scores."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return rng.choices(range(5, vocabulary), k=count)

    scores = dict(ref_chosen_logps=-50.0, ref_rejected_logps=-40.0)
    return [{"prompt_ids": draw(p), "chosen_ids": draw(c), "rejected_ids": draw(r), **scores} for p, c, r in lengths]
