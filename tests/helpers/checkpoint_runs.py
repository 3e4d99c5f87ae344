"""Short trainings with checkpoints, and what it means that a resumed one ended as the uninterrupted one."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.comparisons import differences, without_timings
from helpers.tiny import make_lora, pairs_dataset, training_options

DUAL = dict(constraint="lagrangian", epsilon=0.2, dual_lr=0.3, dual_max=5.0)


class StopAt(TrainerCallback):
    """Ends training after a step, as a kill would that came between two steps."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def trainer_of(folder, model, tokenizer, *, lora=False, stop=None, plain=False, callbacks=(), data=None, **options):
    """An epoch of three steps and one step more, saved every second step and logged every third."""
    defaults = dict(
        max_steps=4,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=3,
        lr_scheduler_type="cosine",
    )
    if not plain:
        defaults["gamma"] = 0.5
    torch.manual_seed(0)
    return (DPOTrainer if plain else CPOConstrainedTrainer)(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=(DPOConfig if plain else CPOConstrainedConfig)(**training_options(folder, **{**defaults, **options})),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(6) if data is None else data,
        eval_dataset=pairs_dataset(3, seed=5) if "eval_strategy" in options else None,
        peft_config=make_lora() if lora else None,
        callbacks=[*callbacks, *([StopAt(stop)] if stop else [])],
    )


def assert_same_end(resumed, alone):
    checkpoint = f"checkpoint-{alone.state.global_step}"
    logs = [[without_timings(record) for record in trainer.state.log_history] for trainer in (resumed, alone)]
    assert logs[0] == logs[1] and len(logs[0]) > 1
    assert resumed.state.global_step == alone.state.global_step
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (resumed, alone))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not differences(*(Path(trainer.args.output_dir) / checkpoint for trainer in (resumed, alone)))
