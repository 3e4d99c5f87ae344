"""Runs the micro-batches of one training step on a device without memory, and prints where the CPU waits for it.

The trainer is real; the model is an 8B shape with adapters, the batches are its own collator's, and everything is on: groups,
probabilities, multipliers, a floor. One line of JSON: the waits of each micro-batch, of the step's end, and of an evaluation.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from run_on_fake_gpu import model_on

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.forward import Verdict
from trl_cpo.engine.forward.repack import unwrap

from helpers.fake_device import FakeGPU
from helpers.tiny import make_lora, make_model, make_tokenizer, pair_rows, training_options

ACCUMULATED, PAIRS = 3, 4


def trainer_in(folder: str, **options) -> CPOConstrainedTrainer:
    rows = [
        {**row, "sure": 0.6 + 0.1 * (i % 4), "kind": "ab"[i % 2], "better": 1.0}
        for i, row in enumerate(pair_rows(ACCUMULATED * PAIRS))
    ]
    given = training_options(
        Path(folder),
        constraint="lagrangian",
        gamma=0.5,
        chosen_floor=0.5,
        group_column="kind",
        gamma_by_group={"a": 0.5, "b": 1.0},
        probability_column="sure",
        margin_column="better",
        per_device_train_batch_size=PAIRS,
        gradient_accumulation_steps=ACCUMULATED,
        **options,
    )
    return CPOConstrainedTrainer(
        model=make_model(),
        args=CPOConstrainedConfig(**given),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
    )


def steps(trainer: CPOConstrainedTrainer) -> dict:
    """The waits of a step's micro-batches, of its end, and of one evaluated batch."""
    gpu = FakeGPU()
    trainer.model = model = model_on(gpu, 1, lora=True)
    trainer._sharing._known[unwrap(model)] = Verdict(True, attention="segments")
    trainer._sharing._probed_with[unwrap(model)] = "sdpa"
    trainer._start_check.due(0)
    batches = [trainer.data_collator(trainer.train_dataset.select(range(i, i + PAIRS)).to_list()) for i in range(0, 12, PAIRS)]
    seen = {}
    callbacks = trainer.callback_handler
    # Groups whose λ differ, each with its own γ on the device.
    for number, part in enumerate(trainer._bounds.multipliers["dual"].parts.values()):
        part.value = 0.5 + number
    trainer._gammas["gpu"] = gpu.empty(trainer._gammas["cpu"])
    with gpu:
        for number, batch in enumerate(batches):
            trainer.accelerator.gradient_state._set_sync_gradients(number == len(batches) - 1)
            loss = trainer.compute_loss(model, gpu.like(batch))
            loss.backward()
            seen[f"micro-batch {number}"], gpu.waits = gpu.waits, []
        trainer.control = callbacks.on_step_end(trainer.args, trainer.state, trainer.control)
        seen["end"], gpu.waits = gpu.waits, []
        with torch.no_grad():
            trainer.compute_loss(model.eval(), gpu.like(batches[0]))
        seen["evaluation"] = gpu.waits
    return {when: [wait.place for wait in waits] for when, waits in seen.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(steps(trainer_in(folder))))
