"""The trainings of test_scaling.py and test_packed_parallel.py, and their launch: one for each kind of processes does both."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.launching import deepspeed_config
from helpers.paths import PROCESSES, ROOT
from helpers.tiny import pair_rows

SCRIPT = PROCESSES / "train_parallel.py"
#: Pairs of a step, over all processes.
BATCH = 4
#: Pairs to train and to evaluate on. 7 to evaluate in batches of 2 on 2 processes: the last batch is filled up with repeats,
#: which must not count.
PAIRS = {"scaling": (16, 7), "packed": (12, 6)}

# AdamW as a user has it, but for an epsilon at which its step is smooth in the gradient: a component that is all rounding
# would otherwise move a weight by the whole learning rate, up or down.
ADAMW = dict(optim="adamw_torch", adam_epsilon=1e-3)
LAGRANGIAN = dict(constraint="lagrangian", dual_lr=0.01, dual_max=5.0, **ADAMW)
PRICE = dict(price=True, price_prompts=3, price_tokens=6)
REFERENCE = "the folder of the reference model"

#: Every constraint; full and adapter; the reference on the fly, its own model or the start, and precomputed; accumulation;
#: save and resume. PACKED has clip: full, adapter, precomputed, recomputed.
SCALING = {
    "full none explicit": {"ref_model": REFERENCE},
    "full softplus precomputed": {"options": {"constraint": "softplus", "precompute_ref_log_probs": True}},
    "full penalty adamw": {"options": {"constraint": "penalty", "max_grad_norm": 1.0, **ADAMW, **PRICE}, "accumulate": 2},
    "full lagrangian explicit resumed": {"ref_model": REFERENCE, "resume": True, "options": LAGRANGIAN},
    "full lagrangian labels resumed": {
        "resume": True,
        "options": {
            **LAGRANGIAN,
            "probability_column": "sure",
            "margin_column": "better",
            "group_column": "topic",
            "gamma_by_group": {"odd": 0.5},
            "chosen_floor": 0.01,
        },
    },
    "full clip tokens resumed": {
        "rounds": 2,
        "resume": True,
        "options": {"constraint": "clip", "tokens_per_step": 150, **ADAMW},
    },
    "lora inverse_prob": {
        "lora": True,
        "options": {"constraint": "inverse_prob", "logps_reduction": "mean", "gamma": 0.05},
    },
    "lora inverse_logp precomputed": {
        "lora": True,
        "options": {"constraint": "inverse_logp", "precompute_ref_log_probs": True, **PRICE},
    },
    "lora lagrangian precomputed resumed": {
        "lora": True,
        "resume": True,
        "options": {**LAGRANGIAN, "precompute_ref_log_probs": True},
    },
}
#: Adapters on 4-bit weights, in bfloat16 as TRL makes them: alike until the first update rounds them.
QLORA = {"qlora clip": {"lora": True, "nf4": True, "options": {"constraint": "clip", "max_steps": 3}}}
#: The run of SCALING that is also done with `deepspeed=file`.
JSON_RUN = "full penalty adamw"
#: Such files, which are run in the launch of a YAML file, in its place.
JSON_OF = {"zero1": ["zero1"], "zero2": ["zero2"], "zero3": ["zero3", "zero3_offload"]}

#: Under clip, each packed and padded.
PACKED = {
    "full": {},
    "lora": {"lora": True},
    "precomputed": {"options": {"precompute_ref_log_probs": True}},
    # The probe fails within a layer, and then tries masks: no process may wait for another, nothing gathered may stay.
    "masked": {"lora": True, "segments_fail": True},
    # One process alone finds a fault: no process may pack otherwise than the others.
    "disagreed": {"lora": True, "refused_in": 1},
    "recomputed": {"options": {"gradient_checkpointing": True}, "accumulate": 2},
}


def both_ways(name: str, **run) -> list[dict]:
    return [{"name": name, "packed": packed, **run} for packed in (True, False)]


def launcher(kind: str) -> list[str]:
    """The command of a user, with what differs for two processes on this machine; `use_cpu` and `bf16` are the script's."""
    if kind == "one":
        return [sys.executable]
    config = str(ROOT / "deepspeed_configs" / f"{kind}.yaml")
    options = ["--config_file", config, "--num_processes", "2", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


def offload_without_compiling(folder: Path) -> str:
    """zero3_offload.json with the one key that leaves Adam to the trainer: DeepSpeed's is compiled for minutes."""
    config = json.loads((ROOT / "deepspeed_configs" / "zero3_offload.json").read_text())
    assert "zero_force_ds_cpu_optimizer" not in config
    path = folder / "zero3_offload.json"
    path.write_text(json.dumps({**config, "zero_force_ds_cpu_optimizer": False}))
    return str(path)


def scaling_runs(kind: str, folder: Path) -> list[dict]:
    """In one process those that others are compared with: in float32, in float64, and with 4-bit weights."""
    if kind == "one":
        single = [{"name": name, **run, "resume": False} for name, run in SCALING.items()]
        # With the reference on the fly, which is the same in exact numbers.
        double = []
        for name, run in SCALING.items():
            options = {key: value for key, value in run.get("options", {}).items() if key != "precompute_ref_log_probs"}
            double.append({**run, "name": f"{name} double", "options": options, "double": True, "resume": False})
        return single + double + [{"name": name, **run} for name, run in QLORA.items()]
    # ZeRO-1 is ZeRO-2 with whole gradients.
    chosen = {JSON_RUN: SCALING[JSON_RUN]} if kind == "zero1" else {**SCALING, **QLORA}
    runs = [{"name": name, **run} for name, run in chosen.items()]
    for name in JSON_OF.get(kind, ()):
        file = ROOT / "deepspeed_configs" / f"{name}.json"
        file = offload_without_compiling(folder) if name == "zero3_offload" else str(file)
        run = SCALING[JSON_RUN]
        runs.append({**run, "name": f"{name} json", "options": {**run["options"], "deepspeed": file}})
    return runs


def packed_runs(kind: str, folder: Path) -> list[dict]:
    """In one process padded ones, a compiled model, and 4-bit weights. The latter must not be evaluated: see the test."""
    if kind == "one":
        compiled = both_ways("compiled", options={"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1})
        quantized = both_ways("nf4", nf4=True, lora=True, evaluate=False)
        return [{"name": name, "packed": False, **run} for name, run in PACKED.items()] + compiled + quantized
    # A file with which ZeRO-3 keeps nothing whole.
    more = {"deepspeed": str(deepspeed_config(kind, folder))} if kind.startswith("zero") else {}
    runs = {name: {**run, "options": {**run.get("options", {}), **more}} for name, run in PACKED.items()}
    return [run for name, options in runs.items() for run in both_ways(name, **options)]


def data_in(folder: Path, train: int, test: int) -> dict[str, str]:
    """Files by split, of rows that also have a label, a margin and a group."""
    files = {}
    for split, rows in (("train", pair_rows(train)), ("test", pair_rows(test, seed=5))):
        for number, row in enumerate(rows):
            row |= {"sure": 0.6 + 0.3 * (number % 2), "better": 0.1 * (number % 3), "topic": ("even", "odd")[number % 3 == 0]}
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {split: str(file) for split, file in files.items()}


def launch(kind: str, folder: Path, model: str, reference: str) -> dict[str, dict]:
    """Does all trainings of a kind; gives by job the runs, and by process what it saw of each."""
    jobs = {"scaling": scaling_runs} if kind == "zero1" else {"scaling": scaling_runs, "packed": packed_runs}
    told = {}
    for name, runs_of in jobs.items():
        place = folder / name
        place.mkdir()
        runs = [{**run, "ref_model": reference} if "ref_model" in run else run for run in runs_of(kind, place)]
        told[name] = {"data": data_in(place, *PAIRS[name]), "runs": runs}
    processes = 1 if kind == "one" else 2
    job = {"kind": kind, "model": model, "folder": str(folder), "batch": BATCH // processes, "jobs": told}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")},
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    command = [*launcher(kind), str(SCRIPT), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    # The launcher's own words come last; those of the processes are marked, or are all there is.
    words = [line for line in done.stderr.splitlines() if line.startswith("[rank")] or done.stderr.splitlines()
    assert done.returncode == 0, "\n".join(words[-40:])
    seen = [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(processes)]
    return {name: {"runs": told[name]["runs"], "seen": [process[name] for process in seen]} for name in jobs}
