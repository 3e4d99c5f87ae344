"""The files that an earlier version wrote (tests/golden/earlier), and the trainings they are of, as both versions make them."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.paths import TESTS
from helpers.tiny import training_options

EARLIER = TESTS / "golden" / "earlier"
MODEL, PAIRS = "model", "pairs.jsonl"
#: The step of the checkpoint, of so many steps.
SAVED_AT, STEPS = 2, 5
#: What `trl-cpo train` was given beside the model, the pairs and the folder.
RUN: dict[str, str] = {
    "--constraint": "clip",
    "--gamma": "0.5",
    "--beta": "0.5",
    "--use_cpu": "True",
    "--bf16": "False",
    "--dtype": "float32",
    "--max_length": "64",
    "--max_steps": "6",
    "--learning_rate": "1e-2",
    "--per_device_train_batch_size": "4",
    "--logging_steps": "2",
    "--eval_strategy": "steps",
    "--eval_steps": "3",
    "--held_out": "8",
    "--save_strategy": "no",
    "--report_to": "none",
    "--seed": "3",
}


def trainer_of(folder, place: Path, **options) -> CPOConstrainedTrainer:
    """With model and pairs from `place`, where their paths are what is recorded of them."""
    torch.manual_seed(0)
    return CPOConstrainedTrainer(
        model=AutoModelForCausalLM.from_pretrained(place / MODEL, dtype=torch.float32),
        args=CPOConstrainedConfig(**training_options(folder, gamma=0.5, **options)),
        processing_class=AutoTokenizer.from_pretrained(place / MODEL),
        train_dataset=Dataset.from_list([json.loads(line) for line in (place / PAIRS).read_text().splitlines()]),
    )


def lagrangian(folder, place: Path = EARLIER) -> CPOConstrainedTrainer:
    """The training whose checkpoint was kept: λ moves, a step has two micro-batches, logging windows overlap the checkpoint."""
    return trainer_of(
        folder,
        place,
        constraint="lagrangian",
        epsilon=0.2,
        dual_lr=0.1,
        dual_max=5.0,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        logging_steps=3,
        save_strategy="steps",
        save_steps=SAVED_AT,
    )


def scored(folder, place: Path = EARLIER) -> CPOConstrainedTrainer:
    """The trainer whose table of reference log-probabilities was kept."""
    return trainer_of(folder, place, constraint="clip", per_device_train_batch_size=4, precompute_ref_log_probs=True)
