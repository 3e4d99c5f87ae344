"""Waits for the device, and kernels started, in the packed forward and backward of an 8B shape, on a device without memory."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from helpers.paths import ROOT

#: Kernels that one more layer starts, forward and backward, by adapters and pairs. Attention by segments makes two calls a
#: pair, so they grow with the pairs.
SEGMENTS = {
    "full, 8": (121, 162),
    "full, 32": (313, 306),
    "lora, 8": (149, 189),
    "lora, 32": (341, 333),
}


def printed_by(program: str, *arguments: str) -> str:
    """What a program of tests/processes prints, in a process of its own: a device registered with torch stays."""
    command = [sys.executable, str(ROOT / "tests" / "processes" / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def segments() -> dict:
    return json.loads(printed_by("run_on_fake_gpu.py", "segments").splitlines()[-1])


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


def test_a_packed_forward_and_backward_wait_for_nothing(segments):
    assert {case: found["waits"] for case, found in segments.items()} == {f"segments, {case}": [] for case in SEGMENTS}


def test_kernels_of_a_layer(segments):
    started = {case: (found["forward"], found["backward"]) for case, found in segments.items()}
    assert started == {f"segments, {case}": kernels for case, kernels in SEGMENTS.items()}


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
