"""Run by test_attacks.py in two processes, one of which has a full disk or another clock.

attack_together.py '{"do": "train" | "precompute", "model": ..., "folder": ..., "full": rank or null, "clock": seconds}'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

import json
import os
import time

JOB = json.loads(sys.argv[1])
RANK, FOLDER = int(os.environ["RANK"]), Path(JOB["folder"])
if RANK == 1 and JOB.get("clock"):
    own_time = time.time
    time.time = lambda: own_time() + JOB["clock"]

import resource

from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.tiny import make_tokenizer, pair_rows, training_options

#: Bytes that a file may have on a full disk.
LEFT = 2_000


def fill_disk() -> None:
    if JOB.get("full") == RANK:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LEFT, resource.RLIM_INFINITY))


class FillsDisk(TrainerCallback):
    """The disk is full from step 3 on."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            fill_disk()


def main() -> None:
    precompute = JOB["do"] == "precompute"
    if precompute:
        fill_disk()
    options = dict(
        output_dir=str(FOLDER / "out"),
        max_steps=JOB.get("steps", 4),
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        precompute_ref_log_probs=precompute,
        enable_jit_checkpoint=JOB.get("jit", False),
    )
    trainer = CPOConstrainedTrainer(
        model=JOB["model"],
        args=CPOConstrainedConfig(**training_options(**options), constraint="clip"),
        processing_class=make_tokenizer(),
        train_dataset=Dataset.from_list(pair_rows(JOB.get("pairs", 8))),
        callbacks=[FillsDisk()],
    )
    trainer.train(resume_from_checkpoint=JOB.get("resume"))
    (FOLDER / f"ended{RANK}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    disable_progress_bars()
    main()
