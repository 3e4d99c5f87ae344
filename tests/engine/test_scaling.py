"""One answer everywhere: DDP, ZeRO-1/2/3 and FSDP2 in two processes, launched with the files of deepspeed_configs/.

Every training is set beside the same one in one process and in double precision. Float32 may leave the latter by no more than
a few times what it does in one process, where only the order of sums is another (docs/scaling.md derives it).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.launching import WRAPPINGS
from helpers.paths import PROCESSES, ROOT
from helpers.tiny import pair_rows

pytestmark = pytest.mark.slow
SCRIPT = PROCESSES / "train_scaling.py"
# 7 pairs to evaluate in batches of 2 on 2 processes: the last batch is filled up with repeats, which must not count.
STEPS, TRAIN_PAIRS, EVAL_PAIRS, BATCH = 4, 16, 7, 4

# AdamW as a user has it, but for an epsilon at which its step is smooth in the gradient: a component that is all rounding
# would otherwise move a weight by the whole learning rate, up or down.
ADAMW = dict(optim="adamw_torch", adam_epsilon=1e-3)
LAGRANGIAN = dict(constraint="lagrangian", dual_lr=0.01, dual_max=5.0, **ADAMW)
PRICE = dict(price=True, price_prompts=3, price_tokens=6)
TOKEN_MEANS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
REFERENCE = object()  # stands for the folder of the reference model

#: Every constraint; full and adapter; the reference on the fly, its own model or the start, and precomputed; accumulation;
#: save and resume. test_packed_parallel.py has clip: full, adapter, precomputed, recomputed.
RUNS = {
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
#: Runs of the JSON files: this one, with `deepspeed=file`.
JSON_RUN = "full penalty adamw"

#: How much further from double precision than one process's float32 a run may be, and what is taken as its least distance:
#: roundings of the largest number summed (log-probabilities, nats) or of a weight.
FACTOR, ROUNDINGS, UNIT = 4, 4, 2.0**-24


def launcher(kind: str) -> list[str]:
    """The command of a user, with what differs for two processes on this machine; `use_cpu` and `bf16` are the script's."""
    if kind == "one":
        return [sys.executable]
    config = str(ROOT / "deepspeed_configs" / f"{kind}.yaml")
    options = ["--config_file", config, "--num_processes", "2", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, model_folder, ref_model_folder):
    """Starts trainings of a kind; gives, by process and run, what was seen of it, and of the resumed one if there is one."""

    def launch(kind: str, runs: list[dict]) -> list[list[list[dict]]]:
        folder = tmp_path_factory.mktemp(kind)
        data = {}
        for split, rows in (("train", pair_rows(TRAIN_PAIRS)), ("test", pair_rows(EVAL_PAIRS, seed=5))):
            for number, row in enumerate(rows):
                row |= {
                    "sure": 0.6 + 0.3 * (number % 2),
                    "better": 0.1 * (number % 3),
                    "topic": ("even", "odd")[number % 3 == 0],
                }
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            data[split] = str(folder / f"{split}.jsonl")
        runs = [{**run, "ref_model": ref_model_folder} if "ref_model" in run else run for run in runs]
        processes = 1 if kind == "one" else 2
        job = dict(kind=kind, model=model_folder, data=data, folder=str(folder), batch=BATCH // processes, runs=runs)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")},
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            # References precomputed in one kind are not taken up in another.
            "TRL_CPO_CACHE": str(folder / "cache"),
        }
        command = [*launcher(kind), str(SCRIPT), json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        # The launcher's own words come last; those of the processes are marked, or are all there is.
        words = [line for line in done.stderr.splitlines() if line.startswith("[rank")] or done.stderr.splitlines()
        assert done.returncode == 0, "\n".join(words[-40:])
        return [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(processes)]

    return launch


@pytest.fixture(scope="module")
def one_process(launched) -> dict[str, tuple[dict, dict]]:
    """By name of the run: in float32, and in float64 with the reference on the fly, which is the same in exact numbers."""
    double = []
    for name, run in RUNS.items():
        options = {key: value for key, value in run.get("options", {}).items() if key != "precompute_ref_log_probs"}
        double.append({**run, "name": f"{name} double", "options": options, "double": True, "resume": False})
    single = [{"name": name, **run, "resume": False} for name, run in RUNS.items()]
    quantized = [{"name": name, **run} for name, run in QLORA.items()]
    (seen,) = launched("one", single + double + quantized)
    firsts = [run[0] for run in seen]
    pairs = zip(firsts[: len(RUNS)], firsts[len(RUNS) : 2 * len(RUNS)], strict=True)
    return {**dict(zip(RUNS, pairs, strict=True)), "qlora clip": (firsts[-1], None)}


def weights(run: dict) -> dict[str, torch.Tensor]:
    (path,) = Path(run["trained"]).glob("*.safetensors")
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    # Some ways of saving write tied weights twice.
    tensors.pop("lm_head.weight", None)
    return tensors


def numbers(run: dict, at_reference: bool) -> dict[str, list[float]]:
    """By name, what was logged at each step, and what the evaluation gave."""
    found = {}
    for step, record in enumerate([*run["logs"], run["evaluated"]]):
        for key, value in record.items():
            # While the policy is the reference still, which of two equal numbers is larger is chance.
            chance = key in ("cpo/beats_reference", "cpo/in_undesirable_region", "rewards/accuracies")
            if not (step == 0 and at_reference and chance):
                found.setdefault(key, []).append(value)
    return found


def assert_as_exact(run: dict, single: dict, double: dict, at_reference: bool, apart: tuple[str, ...] = ()) -> None:
    """`run` is about as far from `double` as `single` is, in all but the metrics `apart`."""
    assert len(run["logs"]) == len(double["logs"]) == STEPS and len(run["evaluated"]) > 12
    ours, theirs, exact = (
        {name: values for name, values in numbers(each, at_reference).items() if name not in apart}
        for each in (run, single, double)
    )
    assert ours.keys() == theirs.keys() == exact.keys()
    largest = max(abs(value) for key in ("logps/chosen", "logps/rejected") for value in exact[key])
    for key, values in exact.items():
        # Of one number the rounding is chance; of all steps together it is a size.
        seen = max(abs(a - b) for a, b in zip(theirs[key], values, strict=True))
        size = max(largest, *map(abs, values))
        allowed = FACTOR * max(seen, ROUNDINGS * UNIT * size)
        for step, (value, expected) in enumerate(zip(ours[key], values, strict=True)):
            assert abs(value - expected) <= allowed, (key, step, value, expected, allowed)
    ours, theirs, exact = weights(run), weights(single), weights(double)
    assert ours.keys() == theirs.keys() == exact.keys() and exact
    seen = max((theirs[key] - value).abs().max().item() for key, value in exact.items())
    allowed = FACTOR * max(seen, ROUNDINGS * UNIT)
    for key, value in exact.items():
        assert (ours[key] - value).abs().max().item() <= allowed, (key, allowed)


def assert_alike_in_bfloat16(run: dict, single: dict) -> None:
    """`run` starts as `single` does and stays about there."""
    ours, theirs = run["logs"], single["logs"]
    assert len(ours) == len(theirs) == 3 and run["quantized"] == single["quantized"] == 14
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        # Before any update the forward is as exact as elsewhere; the gradient is in bfloat16.
        bounds = dict(rel=1e-5, abs=1e-4) if step == 0 else dict(rel=1e-2, abs=5e-2)
        assert mine.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=2e-2)
        assert mine == pytest.approx(other, **bounds)
    ours, theirs = weights(run), weights(single)
    assert ours.keys() == theirs.keys() and ours
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-2)


def assert_resumed(whole: dict, resumed: dict) -> None:
    """Gone on with from its second step, a run is bit for bit the one that was not interrupted."""
    assert len(resumed["logs"]) == STEPS - 2
    assert resumed["logs"] == whole["logs"][2:] and resumed["evaluated"] == whole["evaluated"]
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_priced(price: dict, single: dict, kind: str, run: dict) -> None:
    """Likelihoods are those of one process; samples are others. Sharded models are not measured, and trained all the same."""
    if not run.get("options", {}).get("price") or kind in ("zero3", "fsdp2"):
        assert not price
        return
    assert price.keys() == single.keys()
    assert price["eval_cpo/chosen_nll"] == pytest.approx(single["eval_cpo/chosen_nll"], rel=1e-4)
    assert price["eval_cpo/kl"] > 0 and price["eval_cpo/answer_tokens"] == single["eval_cpo/answer_tokens"]


def offload_without_compiling(folder: Path) -> str:
    """zero3_offload.json with the one key that leaves Adam to the trainer: DeepSpeed's is compiled for minutes."""
    config = json.loads((ROOT / "deepspeed_configs" / "zero3_offload.json").read_text())
    assert "zero_force_ds_cpu_optimizer" not in config
    path = folder / "zero3_offload.json"
    path.write_text(json.dumps({**config, "zero_force_ds_cpu_optimizer": False}))
    return str(path)


EXPECTED = {
    **WRAPPINGS,
    "zero1": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 1},
}
#: JSON files that are run in the launch of a YAML file, in its place.
JSON_OF = {"zero1": ["zero1"], "zero2": ["zero2"], "zero3": ["zero3", "zero3_offload"]}


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_two_processes_give_what_one_gives(launched, one_process, tmp_path, kind):
    # ZeRO-1 is ZeRO-2 with whole gradients.
    chosen = {JSON_RUN: RUNS[JSON_RUN]} if kind == "zero1" else {**RUNS, **QLORA}
    runs = [{"name": name, **run} for name, run in chosen.items()]
    for name in JSON_OF.get(kind, ()):
        file = ROOT / "deepspeed_configs" / f"{name}.json"
        file = offload_without_compiling(tmp_path) if name == "zero3_offload" else str(file)
        run = RUNS[JSON_RUN]
        runs.append({**run, "name": f"{name} json", "options": {**run["options"], "deepspeed": file}})
    ranks = launched(kind, runs)
    for seen in ranks:
        for run, results in zip(runs, seen, strict=True):
            name = run["name"] if run["name"] in chosen else JSON_RUN
            for result in results:
                assert result["processes"] == 2
                assert {key: result[key] for key in EXPECTED[kind]} == EXPECTED[kind]
                assert (result["partitioned"] > 0) == (kind == "zero3")
                assert (result["dtensors"] > 0) == (kind == "fsdp2")
                assert result["offloaded"] == (run["name"] == "zero3_offload json")
                # Sized by the model's width of 32: it was the JSON file that was read.
                assert (result["bucket"] == 32 * 32) == run["name"].endswith("json")
            if run.get("nf4"):
                # The logs are changed by it: a copy for each process.
                assert_alike_in_bfloat16(*(json.loads(json.dumps(each)) for each in (results[0], one_process[name][0])))
                continue
            # The adapters are not the usual zeros.
            at_reference = not (run.get("lora") or run.get("ref_model"))
            # TRL's means over tokens are over those of all processes, and then over micro-batches.
            apart = TOKEN_MEANS if run.get("rounds") else ()
            assert_as_exact(results[0], *one_process[name], at_reference, apart)
            assert_priced(results[0]["price"], one_process[name][0]["price"], kind, run)
            if run.get("resume"):
                assert_resumed(*results)
    # λ and every other number that is not a process's own is the same on both, to the last bit.
    for first, second in zip(*ranks, strict=True):
        for ours, theirs in zip(first, second, strict=True):
            assert [log["cpo/gap"] for log in ours["logs"]] == [log["cpo/gap"] for log in theirs["logs"]]
            assert ours["evaluated"] == theirs["evaluated"] and ours["price"] == theirs["price"]
            lambdas = [log.get("cpo/lambda") for log in ours["logs"]]
            assert lambdas == [log.get("cpo/lambda") for log in theirs["logs"]]
            if lambdas[0] is not None:
                # It moves, and does not stand at its cap.
                assert len(set(lambdas)) == len(lambdas) and max(lambdas) < 5
