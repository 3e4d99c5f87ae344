"""The tests for a GPU are run on the CPU over emulated kernels, so that they still run where there is one.

Each is done with a few of its parameters (`some` and `LORA` in helpers/on_gpu.py) on small models: it is about the lines of
the tests. What the emulation can say of the package is held by tests/engine/forward.
"""

import os
import re
import subprocess
import sys

import pytest

from helpers.paths import ROOT


@pytest.mark.slow(40)
def test_the_tests_for_a_gpu_pass_over_emulated_kernels():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {**os.environ, "TRL_CPO_GPU_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRL_CPO_GPU_LOG", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    passed, skipped = (re.search(rf"(\d+) {word}", done.stdout) for word in ("passed", "skipped"))
    assert int(passed[1]) > 45 and int(skipped[1]) == 1, done.stdout[-300:]
