"""Real pairs, a real model: SmolLM2-135M with LoRA on HH-RLHF, by sums and by means. Every arm is reported; none is tuned."""

import hashlib
import json
from pathlib import Path
from typing import Any

from trl_cpo.data.loading import load_pairs

from . import arms
from .measures import bits, gaps, kl, sampled
from .text import part_of

_MEANS: dict[str, Any] = {"loss_type": ["sigmoid_norm"], "logps_reduction": "mean"}
ARMS: dict[str, dict[str, Any]] = {
    **{f"dpo {beta:g}": {"constraint": "none", "beta": beta} for beta in (0.03, 0.1, 0.3)},
    **{f"clip {beta:g}": {"constraint": "clip", "beta": beta, "gamma": 1.0} for beta in (0.03, 0.1, 0.3)},
    **{f"dpo means {beta:g}": {"constraint": "none", "beta": beta, **_MEANS} for beta in (2.5, 10.0)},
    **{f"clip means {beta:g}": {"constraint": "clip", "beta": beta, "gamma": 0.05, **_MEANS} for beta in (2.5, 10.0)},
    "clip 0.1 reach 10": {"constraint": "clip", "beta": 0.1, "gamma": 1.0, "reach": 10.0},
}


class Task:
    """Pairs whose two sides answer the same dialogue, by part; what is measured on the held-out ones."""

    def __init__(self, source: str, tokenizer, *, longest: int, pairs_used: int, held_out: int, prompts: int, new: int):
        self.tokenizer, self.new, self.prompts = tokenizer, new, prompts
        self.pairs: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
        for row in load_pairs(source):
            prompt, chosen = _parted(row["chosen"])
            other, rejected = _parted(row["rejected"])
            if prompt == other and chosen != rejected and max(map(len, (prompt, chosen, rejected))) <= longest:
                part = "train" if part_of(prompt) == "train" else "test"
                self.pairs[part].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        self.pairs = {"train": self.pairs["train"][:pairs_used], "test": self.pairs["test"][:held_out]}
        self.digest = hashlib.sha256(json.dumps(self.pairs).encode()).hexdigest()[:16]

    def measured(self, policy, reference, seed: int) -> dict[str, Any]:
        """Share of held-out pairs preferred, by sums and by means; KL of own answers to their prompts, and their length."""
        sums, means = gaps(policy, self.tokenizer, self.pairs["test"], 32)
        ids = [self.tokenizer(row["prompt"])["input_ids"] for row in self.pairs["test"][: self.prompts]]
        answers = sampled(policy, ids, self.tokenizer, self.new, 100 + seed)
        nats, tokens = kl(policy, reference, ids, answers, self.tokenizer.pad_token_id)
        shares = {"preferred": sums > 0, "preferred_means": means > 0, "kl": nats, "tokens": tokens}
        found = {name: round(values.float().mean().item(), 4) for name, values in shares.items()}
        return {**found, "kl_token": round((nats.sum() / tokens.sum()).item(), 5), "hits": bits(sums > 0)}


def _parted(dialogue: str) -> tuple[str, str]:
    """A dialogue before its last answer, and the answer."""
    before, cue, answer = dialogue.strip().rpartition("\n\nAssistant:")
    return before + cue, " " + answer.strip()


def run(arm: str, task: Task, base: Path, *, scale: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains one arm; its curve."""
    from transformers import AutoModelForCausalLM

    reference, curve = AutoModelForCausalLM.from_pretrained(base).eval().to(arms.device()), []

    def measure(step: int, policy) -> None:
        curve.append({"step": step, "test": task.measured(policy, reference, seed)})

    if arm == "start":
        measure(0, reference)
        found, _ = gaps(reference, task.tokenizer, task.pairs["train"], 32)
        told = {"mean": found.mean(), "deviation": found.std(), "misaligned": (found < 0).float().mean()}
        return {"curve": curve, "pairs": len(found), "ref_gap": {name: round(value.item(), 4) for name, value in told.items()}}
    arms.train(ARMS[arm], str(base), task.tokenizer, task.pairs["train"], seed=seed, measure=measure, **scale)
    return {"curve": curve}
