"""Run by test_processes.py in several processes: trainers that must or must not agree, and processes that die.

train_together.py '{"do": "disagree" | "train", "model": ..., "folder": ..., ...}'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

from helpers import imported  # noqa: F401

# isort: split

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.processes import ProcessesDisagree

from helpers.tiny import make_tokenizer, pair_rows, training_options

JOB = json.loads(sys.argv[1])
RANK = int(os.environ["RANK"])
FOLDER = Path(JOB["folder"])


def trainer_of(rows=None, model=None, callbacks=(), **options) -> CPOConstrainedTrainer:
    data = Dataset.from_list(pair_rows(8) if rows is None else rows)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "output_dir": str(FOLDER / "out"), **options}
    return CPOConstrainedTrainer(
        model=model or JOB["model"],
        args=CPOConstrainedConfig(**training_options(**options), constraint="clip"),
        processing_class=make_tokenizer(),
        train_dataset=data,
        callbacks=list(callbacks),
    )


def disagree() -> None:
    """Each case on both processes; what each was told, by case."""
    rows = pair_rows(8)
    changed = [*rows[:3], {**rows[3], "chosen": " another"}, *rows[4:]]
    cases = {
        # On process 1: a knob, a row in the middle, fewer rows, another model, no rows at all.
        "gamma": dict(gamma=0.5 + RANK),
        "row": dict(rows=changed if RANK else rows),
        "rows": dict(rows=rows[: 8 - RANK]),
        "model": dict(model=JOB["other_model"] if RANK else JOB["model"]),
        "missing": dict(model=JOB["model"] + "-not-here" * RANK),
        "empty": dict(rows=[] if RANK else rows),
        # What may differ.
        "nothing": dict(run_name=f"process {RANK}", dataloader_num_workers=RANK, log_level=["info", "error"][RANK]),
    }
    told = {}
    for name, case in cases.items():
        try:
            trainer_of(**case)
            told[name] = None
        except ProcessesDisagree as error:
            told[name] = str(error)
    (FOLDER / f"told{RANK}.json").write_text(json.dumps(told))


class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and RANK == 1:
            os.kill(os.getpid(), 9)


class Waits(TrainerCallback):
    """Says that it is in the middle of a training, and slows down."""

    def on_step_end(self, args, state, control, **kwargs):
        (FOLDER / f"step{state.global_step}-{RANK}").touch()
        time.sleep(0.2)


def train() -> None:
    trainer = trainer_of()
    trainer.train()
    seen = {"processes": trainer.accelerator.num_processes, "loss": [], "weights": 0.0}
    seen["loss"] = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    seen["weights"] = sum(weight.double().abs().sum().item() for weight in trainer.model.parameters())
    (FOLDER / f"seen{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    disable_progress_bars()
    if "timeout" in JOB:
        # What `ddp_timeout` does on GPUs; with `use_cpu` transformers 5.23 makes the process group without it.
        PartialState(cpu=True, timeout=timedelta(seconds=JOB["timeout"]))
    if JOB["do"] == "disagree":
        disagree()
        trainer_of(max_steps=100, callbacks=[Dies()]).train()
    else:
        train()
        if "timeout" in JOB:
            trainer_of(max_steps=10_000, callbacks=[Waits()], output_dir=str(FOLDER / "out2")).train()
