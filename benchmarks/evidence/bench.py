"""The experiments by name, their sizes, and what they need: texts and models, made once in a folder."""

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trl_cpo.data.demo.model import demo_model_folder
from trl_cpo.price.questions import gather_questions

from . import decisions, larger, misaligned, real, sampled
from .once import made
from .small import language_model
from .text import Texts, learn_tokenizer, read_texts

#: Sizes: of the model and what it learns, and of every arm.
FULL: dict[str, Any] = {
    "model": {"width": 128, "layers": 6, "steps": 700, "batch": 32, "longest": 80},
    "vocabulary": 2000,
    "longest": 140,
    "decisions": {"pairs": 3000, "prompts": 400, "general": 32},
    "taught": {"steps": 1200, "learning_rate": 2e-3},
    "decisions_arms": {"batch": 32, "learning_rate": 1e-4, "steps": [10, 20, 40, 80, 120]},
    "sampled": {"questions": 6000, "held_out": 300, "new": 40},
    "sampled_arms": {"batch": 32, "learning_rate": 1e-4, "steps": [20, 40, 80, 120]},
    "misaligned": {"pairs_used": 1000, "new": 40},
    "turned": {"steps": 64, "learning_rate": 3e-4},
    "misaligned_arms": {"batch": 32, "learning_rate": 1e-4, "steps": [16, 32, 64, 96]},
    "larger": {"pairs": 1600, "prompts": 400},
    "larger_taught": {
        "routes": {"steps": 60, "batch": 16, "learning_rate": 5e-5},
        "tone": {"steps": 300, "batch": 32, "learning_rate": 5e-5},
    },
    "larger_arms": {"batch": 16, "learning_rate": 1e-4, "steps": [5, 10, 20, 40, 70, 100], "lora": True},
    "real": {"longest": 600, "pairs_used": 1600, "held_out": 400, "prompts": 100, "new": 48},
    "real_arms": {"batch": 16, "learning_rate": 3e-4, "steps": [12, 25, 50, 100], "lora": True},
}
SMALL: dict[str, Any] = {
    "model": {"width": 32, "layers": 1, "steps": 30, "batch": 8, "longest": 48},
    "vocabulary": 500,
    "longest": 140,
    "decisions": {"pairs": 64, "prompts": 16, "general": 4},
    "taught": {"steps": 20, "learning_rate": 1e-3},
    "decisions_arms": {"batch": 8, "learning_rate": 1e-3, "steps": [2, 4]},
    "sampled": {"questions": 64, "held_out": 8, "new": 24, "trial": True},
    "sampled_arms": {"batch": 8, "learning_rate": 1e-3, "steps": [2, 4]},
    "misaligned": {"pairs_used": 32, "new": 8},
    "turned": {"steps": 4, "learning_rate": 1e-3},
    "misaligned_arms": {"batch": 8, "learning_rate": 1e-3, "steps": [2, 4]},
    "larger": {"pairs": 32, "prompts": 16},
    "larger_taught": {variant: {"steps": 4, "batch": 8, "learning_rate": 1e-3} for variant in larger.VARIANTS},
    "larger_arms": {"batch": 4, "learning_rate": 1e-3, "steps": [2, 4], "lora": True},
    "real": {"longest": 400, "pairs_used": 32, "held_out": 8, "prompts": 4, "new": 8},
    "real_arms": {"batch": 4, "learning_rate": 1e-3, "steps": [2, 4], "lora": True},
}


class Bench:
    """The texts, and the models as they are needed: the small one is made once in a folder, the larger one is the demo's."""

    def __init__(self, source: str, work: Path, scale: dict[str, Any], larger_model: str | None = None, trial: bool = False):
        self.source, self.work, self.scale = source, work, scale
        self.given, self.trial = larger_model, trial
        self.tasks: dict[tuple[str, str], Any] = {}

    @cached_property
    def texts(self) -> Texts:
        return read_texts(self.source, self.scale["longest"])

    @cached_property
    def small(self) -> Path:
        """The folder of the small model, which learnt the training part's turns and exchanges."""
        told = [sampled.prompt(question) + " " + answer for question, answer in self.texts.exchanges["train"]]
        told += self.texts.turns["train"]

        def make(folder: Path) -> None:
            tokenizer = learn_tokenizer(told, self.scale["vocabulary"], folder)
            language_model(told, tokenizer, folder, **self.scale["model"])

        return made(self.work / "language-model", make)

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.small)

    @cached_property
    def general(self) -> list[list[int]]:
        """Questions that have nothing to do with the decisions."""
        asked = [question for question, _ in self.texts.exchanges["test"][: self.scale["decisions"]["general"]]]
        return [self.tokenizer(sampled.prompt(question))["input_ids"] for question in asked]

    @cached_property
    def larger_at(self) -> Path:
        """The folder of SmolLM2-135M; in a trial of the small model."""
        return self.small if self.trial else Path(self.given or demo_model_folder())

    @cached_property
    def larger_general(self) -> list[list[int]]:
        """The package's general prompts."""
        asked = gather_questions(self.larger_tokenizer, pairs=None, prompts=16, room=None, max_new_tokens=32)
        return [list(prompt) for prompt in asked.prompts["general"]]

    @cached_property
    def larger_tokenizer(self):
        return AutoTokenizer.from_pretrained(self.larger_at)

    def task(self, experiment: str, variant: str) -> Any:
        """The prompts and pairs of an experiment, read once."""
        if (experiment, variant) not in self.tasks:
            self.tasks[experiment, variant] = self._task(experiment, variant)
        return self.tasks[experiment, variant]

    def _task(self, experiment: str, variant: str) -> Any:
        sizes = self.scale[experiment]
        match experiment, variant:
            case "decisions", _:
                wanted = {name: sizes[name] for name in ("pairs", "prompts")}
                return decisions.Task(self.texts, self.tokenizer, variant, **wanted)
            case "sampled", _:
                return sampled.Task(self.work, self.small, self.tokenizer, self.texts, **sizes)
            case "misaligned", _:
                return misaligned.Task(misaligned.read_pairs(self.source, self.scale["longest"]), self.tokenizer, **sizes)
            case "larger", "routes":
                return larger.routes(self.larger_tokenizer)
            case "larger", "tone":
                return larger.tone(self.larger_tokenizer, self.texts, **sizes)
            case _:
                return real.Task(self.source, self.larger_tokenizer, **sizes)

    def run(self, experiment: str, variant: str, arm: str, seed: int) -> dict[str, Any]:
        """Trains one arm, "start" not at all; its curve, and the digest of the texts that the task is made of."""
        task, scale = self.task(experiment, variant), self.scale[f"{experiment}_arms"]
        if experiment == "decisions":
            at = decisions.reference_folder(self.work, self.small, task, variant, **self.scale["taught"])
            found = decisions.run(arm, decisions.ARMS.get(arm, {}), task, at, self.general, scale=scale, seed=seed)
        elif experiment == "sampled":
            found = sampled.run(arm, variant, task, self.small, scale=scale, seed=seed)
        elif experiment == "misaligned":
            at = misaligned.reference_folder(self.work, self.small, task, variant, **self.scale["turned"], seed=seed)
            found = misaligned.run(arm, task, at, scale=scale, seed=seed)
        elif experiment == "larger":
            taught = self.scale["larger_taught"][variant]
            at = larger.reference_folder(self.work, self.larger_at, task, variant, seed=seed, **taught)
            found = decisions.run(arm, larger.ARMS.get(arm, {}), task, at, self.larger_general, scale=scale, seed=seed)
        else:
            found = real.run(arm, task, self.larger_at, scale=scale, seed=seed)
        return {**found, "texts": task.digest if experiment in NEED_LARGER else self.texts.digest}


#: Arms by experiment.
EXPERIMENTS = {
    "decisions": decisions.ARMS,
    "sampled": sampled.ARMS,
    "misaligned": misaligned.ARMS,
    "larger": larger.ARMS,
    "real": real.ARMS,
}
VARIANTS = {
    "decisions": tuple(decisions.VARIANTS),
    "sampled": ("noiseless", "bradley-terry"),
    "misaligned": tuple(misaligned.SHARES),
    "larger": larger.VARIANTS,
    "real": ("hh",),
}
#: Those that train SmolLM2-135M.
NEED_LARGER = ("larger", "real")
