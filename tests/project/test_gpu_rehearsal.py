"""The tests for a GPU are run on the CPU over emulated kernels, so that they still run where there is one."""

import os
import re
import subprocess
import sys

import pytest

from helpers.paths import ROOT


@pytest.mark.slow
def test_the_tests_for_a_gpu_pass_over_emulated_kernels():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu"]
    # The emulated kernels take a minute for what a device takes milliseconds for.
    left_out = ["-k", "not test_the_kernel_is_plain_attention and not test_packed_is_as_near"]
    environment = {**os.environ, "TRL_CPO_GPU_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRL_CPO_GPU_LOG", None)
    done = subprocess.run(command + left_out, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    passed, skipped = (re.search(rf"(\d+) {word}", done.stdout) for word in ("passed", "skipped"))
    assert int(passed[1]) > 70 and int(skipped[1]) == 1, done.stdout[-300:]
