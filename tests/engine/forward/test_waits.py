"""Waits for the device, and kernels started, in the packed forward and backward of an 8B shape, on a device without memory."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from transformers import Qwen3Config

from trl_cpo.plan import PlanRequest, estimate

from helpers.paths import ROOT
from helpers.tiny import SHAPE_8B

#: Kernels that one more layer starts, forward and backward, by back end, weights that are trained, and pairs. A
#: variable-length call takes any number of pairs. Attention by segments makes two calls a pair, so they grow with the pairs.
KERNELS = {
    "varlen, full, 8": (54, 125),
    "varlen, full, 32": (54, 125),
    "varlen, lora, 8": (84, 152),
    "varlen, lora, 32": (84, 152),
    "segments, full, 8": (121, 162),
    "segments, full, 32": (313, 306),
    "segments, lora, 8": (149, 189),
    "segments, lora, 32": (341, 333),
}
#: What is kept for backward, thousands of bytes a token and layer.
KEPT = {"varlen, full": 217, "varlen, lora": 191, "segments, full": 249, "segments, lora": 222}


def printed_by(program: str, *arguments: str) -> str:
    """What a program of tests/processes prints, in a process of its own: a device registered with torch stays."""
    command = [sys.executable, str(ROOT / "tests" / "processes" / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def layers() -> dict:
    return json.loads(printed_by("run_on_fake_gpu.py", "varlen", "segments").splitlines()[-1])


def test_the_fake_device_sees_every_way_to_wait():
    assert printed_by("wait_on_fake_gpu.py").split("\n")[:-1] == [
        "item",
        "item",
        "copy back",
        "nonzero",
        "boolean index",
        "boolean index",
        "index on the CPU",
        "copy back",
        "blocking copy",
        "boolean index",
    ]


def test_a_packed_forward_and_backward_wait_for_nothing(layers):
    assert {case: found["waits"] for case, found in layers.items()} == dict.fromkeys(KERNELS, [])


def test_kernels_of_a_layer(layers):
    assert {case: (found["forward"], found["backward"]) for case, found in layers.items()} == KERNELS


@pytest.mark.parametrize("case", KEPT)
def test_plan_knows_what_a_layer_keeps(layers, case):
    """Within 5 %; the same for any number of pairs."""
    few, many = (layers[f"{case}, {pairs}"]["kept_per_token"] for pairs in (8, 32))
    assert few == pytest.approx(many, rel=1e-3) == pytest.approx(1000 * KEPT[case], rel=0.01)
    back_end, trained = case.split(", ")
    # The mean pair of the program; TRL gives a quantized model's adapters its type.
    prompt, answers = (103 + 250 + 31 + 180) / 4, (101 + 95 + 206 + 88) / 4
    counted = []
    for blocks in (2, 3):
        request = PlanRequest(
            config=Qwen3Config(**SHAPE_8B, num_hidden_layers=blocks),
            device="cuda" if back_end == "varlen" else "cpu",
            weight_bytes=2,
            autocast=False,
            bits=4 if trained == "lora" else 16,
            lora_rank=16 if trained == "lora" else 0,
            checkpointing=False,
            micro_batch=8,
            max_length=prompt + answers / 2,
            prompt_share=prompt / (prompt + answers / 2),
        )
        counted.append(estimate(request).forward["activations"])
    assert (counted[1] - counted[0]) / (8 * (prompt + answers)) == pytest.approx(few, rel=0.05)


#: Where the CPU waits for the device in a micro-batch, and why.
TRL = {
    # Each number for the log is taken from the device by itself; upstream's, as its loss is used unchanged.
    ("item", "trl/trainer/dpo_trainer.py", "_compute_loss"): 15,
    # Mean logits of the answers, taken out with a mask.
    ("boolean index", "trl/trainer/dpo_trainer.py", "_compute_loss"): 2,
}
#: At the end of a step: the log-probabilities of its pairs, for the check that they are finite, the metrics, the multipliers.
OURS = {("copy back", "trl_cpo/engine/guards.py", "_on_cpu"): 1}


def test_a_step_waits_once_beside_trl():
    """With groups, labels, multipliers and a floor, over three micro-batches; and an evaluated batch."""
    found = json.loads(printed_by("step_on_fake_gpu.py").splitlines()[-1])
    assert {when: Counter(map(tuple, waits)) for when, waits in found.items()} == {
        "micro-batch 0": TRL,
        "micro-batch 1": TRL,
        "micro-batch 2": TRL | OURS,
        "end": {},
        # The number of trained tokens is not counted.
        "evaluation": {**TRL, ("item", "trl/trainer/dpo_trainer.py", "_compute_loss"): 14} | OURS,
    }
