"""Run by test_tables.py: tables of a reference under whatever launched it; each process writes what it has.

    score_in_processes.py '{"kind": "ddp", "folder": ..., "data": ..., "runs": [...]}'

A run: model, a folder; weights, a folder that is copied there first; cache; options of the configuration; dies_writing,
the shard at whose renaming the main process kills itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

import json
import os
import shutil
import signal
import sys
from pathlib import Path

JOB = json.loads(sys.argv[1])

if JOB["kind"] == "zero3":
    import deepspeed

    # An operator for shared memory that would be compiled at first use; without it the same numbers come through gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from helpers import imported  # noqa: F401

# isort: split

import numpy as np
from accelerate.state import AcceleratorState, PartialState
from datasets import load_dataset

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.reference import layout, table_of

from helpers.tiny import make_tokenizer, training_options

layout.SHARD_PAIRS = JOB["shard_pairs"]
RANK = int(os.environ.get("RANK", "0"))


def die_at(shard: int) -> None:
    rename = os.replace

    def renamed(draft, file):
        if RANK == 0 and Path(file).name == f"{shard:06d}.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(draft, file)

    os.replace = renamed


def put_in_place(weights: str, model: str) -> None:
    PartialState().wait_for_everyone()
    if RANK == 0:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(weights, model)
    PartialState().wait_for_everyone()


def score(number: int, run: dict) -> dict:
    os.environ["TRL_CPO_CACHE"] = run["cache"]
    if "dies_writing" in run:
        die_at(run["dies_writing"])
    AcceleratorState._reset_state()
    options = training_options(f"{JOB['folder']}/out", per_device_train_batch_size=2, precompute_ref_log_probs=True)
    args = CPOConstrainedConfig(**{**options, "constraint": "clip", **run.get("options", {})})
    if "weights" in run:
        put_in_place(run["weights"], run["model"])
    data = load_dataset("json", data_files=JOB["data"], cache_dir=f"{JOB['folder']}/datasets", split="train")
    calls = [0]
    compute = CPOConstrainedTrainer.compute_ref_log_probs

    def counted(*args):
        calls[0] += 1
        return compute(*args)

    CPOConstrainedTrainer.compute_ref_log_probs = counted
    trainer = CPOConstrainedTrainer(
        model=run["model"],
        args=args,
        processing_class=make_tokenizer(),
        train_dataset=data,
    )
    CPOConstrainedTrainer.compute_ref_log_probs = compute
    table = table_of(trainer)
    np.save(f"{JOB['folder']}/{number}-{RANK}.npy", np.stack([table.chosen_logps, table.rejected_logps]))
    return {
        "processes": trainer.accelerator.num_processes,
        "calls": calls[0],
        "table": table.folder.name,
        "partitioned": sum(hasattr(weight, "ds_id") for weight in trainer.model.parameters()),
    }


if __name__ == "__main__":
    for number, run in enumerate(JOB["runs"]):
        seen = score(number, run)
        Path(f"{JOB['folder']}/{number}-{RANK}.json").write_text(json.dumps(seen))
