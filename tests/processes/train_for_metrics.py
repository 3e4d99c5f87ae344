"""Run by test_metrics.py in one process and in two: a short training, its metrics written as JSON by rank 0."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

from helpers import imported  # noqa: F401

# isort: split

import io
import json
import os
import sys

from transformers import AutoModelForCausalLM

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.tiny import make_tokenizer, pairs_dataset, training_options

# What this process prints is kept to be looked at: the first alone may speak.
printed = sys.stdout = io.StringIO()
model, ref_model, batch, output_dir, out = sys.argv[1:]
args = CPOConstrainedConfig(
    **training_options(output_dir, per_device_train_batch_size=int(batch), per_device_eval_batch_size=int(batch)),
    constraint="softplus",
    gamma=0.5,
)
trainer = CPOConstrainedTrainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    ref_model=AutoModelForCausalLM.from_pretrained(ref_model),
    args=args,
    processing_class=make_tokenizer(),
    train_dataset=pairs_dataset(),
    eval_dataset=pairs_dataset(7, seed=5),
)
trainer.train()
evaluated = trainer.evaluate()
if trainer.is_world_process_zero():

    def kept(record, prefix=""):
        # Trainer's eval_loss and TRL's rewards/* weigh batches, repeats included, and not pairs: not comparable here.
        keys = [k for k in record if k.startswith(f"{prefix}cpo/") or k == "loss"]
        return {k: record[k] for k in keys}

    train = [kept(record) for record in trainer.state.log_history if "loss" in record]
    record = {
        "processes": trainer.accelerator.num_processes,
        "train": train,
        "eval": kept(evaluated, "eval_"),
        "evaluated_pairs": trainer.evaluated_pairs["eval"].rows().tolist(),
    }
    with open(out, "w") as file:
        json.dump(record, file)
with open(f"{out}.printed.{os.environ.get('RANK', 0)}", "w") as file:
    file.write(printed.getvalue())
