"""Run by test_interruption.py in two processes: a training that is told to end; each process writes how it ended.

interrupt_together.py '{"model": ..., "folder": ..., "who": "one" | "launcher"}'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

from helpers import imported  # noqa: F401

# isort: split

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import call, patch

from transformers import TrainerCallback

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine import shutdown
from trl_cpo.engine.interruption import TrainingInterrupted

from helpers.tiny import make_tokenizer, pairs_dataset, training_options

JOB = json.loads(sys.argv[1])
RANK = int(os.environ["RANK"])
FOLDER = Path(JOB["folder"])


class Moments(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if JOB["who"] == "one" and RANK == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if JOB["who"] == "launcher":
            (FOLDER / "training").touch()
            time.sleep(0.02 * (1 + RANK))  # in another moment of the step each


options = training_options(
    FOLDER / "run", max_steps=500, save_strategy="no", enable_jit_checkpoint=True, per_device_train_batch_size=2
)
if JOB["who"] == "one":
    options["logging_strategy"] = "epoch"  # of two steps
else:
    options["dataloader_num_workers"] = 1
with patch.object(atexit, "register", wraps=atexit.register) as register:
    trainer = CPOConstrainedTrainer(
        model=JOB["model"],
        args=CPOConstrainedConfig(**options, constraint="clip"),
        processing_class=make_tokenizer(),
        train_dataset=pairs_dataset(8 if JOB["who"] == "one" else 400),
        callbacks=[Moments()],
    )
assert trainer.accelerator.num_processes == 2
assert call(shutdown._pause) in register.call_args_list  # a real group of gloo is seen when the trainer is made
# What is put back once the training has ended: the launcher signals a process whose fellow has left before it.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    trainer.train()
except TrainingInterrupted as ended:
    state = json.loads((Path(ended.checkpoint) / "trainer_state.json").read_text())
    seen = {"step": ended.step, "code": ended.code, "logged": [r["step"] for r in state["log_history"]]}
    (FOLDER / f"ended{RANK}.json").write_text(json.dumps(seen))
    raise
