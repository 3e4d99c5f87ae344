"""Run by test_guards.py in two processes: trainings that one process alone has reason to stop; each writes what it saw."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

from helpers import imported  # noqa: F401

# isort: split

import json
import os
import sys

import torch

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.tiny import make_model, make_tokenizer, pairs_dataset, training_options

JOB = json.loads(sys.argv[1])
RANK = int(os.environ["RANK"])
UNSEEN = 399  # a token that stands in no pair


def train(name, change, options, **arguments):
    args = CPOConstrainedConfig(
        **training_options(os.path.join(JOB["folder"], name), per_device_train_batch_size=2, max_steps=2, **options)
    )
    trainer = CPOConstrainedTrainer(
        args=args, processing_class=make_tokenizer(), train_dataset=pairs_dataset(8), **{"model": JOB["model"], **arguments}
    )
    batches = []
    collate = trainer.data_collator

    def collated(examples):
        batches.append(change(collate(examples), trainer))
        return batches[-1]

    trainer.data_collator = collated
    try:
        trainer.train()
        error = ""
    except (ValueError, FloatingPointError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    ids = batches[0]["input_ids"][0][batches[0]["attention_mask"][0].bool()]
    text = trainer.processing_class.decode(ids[1:8].tolist())
    steps = trainer.state.global_step
    return {"error": error, "steps": steps, "text": text, "processes": trainer.accelerator.num_processes}


def another_reference_on_process_1(batch, trainer):
    if RANK == 1:
        batch["ref_rejected_logps"] += 5.0
    return batch


def a_token_without_numbers_on_process_0(batch, trainer):
    if RANK == 0:
        batch["input_ids"][0, 0] = UNSEEN
    return batch


def a_gradient_without_numbers_on_process_1(batch, trainer):
    if RANK == 1 and not hasattr(trainer, "hooked"):
        trainer.hooked = next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    return batch


broken = make_model(tie_word_embeddings=False)
with torch.no_grad():
    broken.model.embed_tokens.weight[UNSEEN] = float("nan")
seen = {
    "start": train("start", another_reference_on_process_1, {"precompute_ref_log_probs": True}),
    "nan": train("nan", a_token_without_numbers_on_process_0, {}, model=broken, ref_model=make_model(1)),
    "gradient": train("gradient", a_gradient_without_numbers_on_process_1, {"save_strategy": "steps", "save_steps": 1}),
}
seen["processes"] = seen["start"]["processes"]
with open(os.path.join(JOB["folder"], f"stopped{RANK}.json"), "w") as file:
    json.dump(seen, file)
