"""Two processes of a run, one with a full disk or another clock: nothing hangs, no half file counts, the reason is said."""

import json
import os
import subprocess
import sys
import time

import pytest

from trl_cpo.cli.errors import lost_process
from trl_cpo.engine.resume import checkpoints

from helpers.paths import PROCESSES, ROOT
from helpers.tiny import pair_rows

OPTIONS = (
    "--output_dir out --constraint clip --use_cpu --bf16 False --max_steps 4 --per_device_train_batch_size 2 --price False "
    "--save_strategy steps --save_steps 1 --save_total_limit 2 --learning_rate 1e-2 --held_out 4 --gradient_checkpointing False"
)


@pytest.fixture
def launch(tmp_path, small_model):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(24)))

    def run(job: dict, *more: str) -> tuple[int, str, float]:
        cache = str(tmp_path / "cache")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRL_CPO_CACHE": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(PROCESSES / "attack_together.py"), json.dumps(job), "train", "--model_name_or_path", small_model]
        started = time.monotonic()
        # Through a pipe: what the processes say is no file of the full disk.
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command += ["--dataset_name", "pairs.jsonl", *OPTIONS.split(), *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=400, check=False, **piped)
        return done.returncode, done.stdout, time.monotonic() - started

    return run


def test_a_lost_process_is_told_from_other_errors():
    assert lost_process(RuntimeError("[…pair.cc:553] Connection closed by peer [127.0.0.1]:5008."))
    assert lost_process(RuntimeError("NCCL error … remote process exited or there was a network error"))
    assert not lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_process(ValueError("Connection closed by peer"))


@pytest.mark.slow(40)
def test_a_full_disk_of_one_process_ends_both_and_says_why(launch, tmp_path):
    """The second process's disk, then the first one's; what that leaves behind stops no later run."""
    resumed = ("--resume_from_checkpoint", "latest")
    for rank, left, more in ((1, 2_000, ()), (0, 30_000, resumed)):
        code, said, seconds = launch({"full": rank, "left": left}, *more)
        assert code != 0 and seconds < 200
        assert "the disk is full" in said or "File too large" in said
        assert "another process of this run has ended" in said and "unexpected error" not in said
        assert checkpoints.newest_checkpoint(str(tmp_path / "out")) is None  # the first one was cut off
    code, said, _ = launch({}, *resumed)
    assert code == 0, said
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.slow(40)
def test_a_full_disk_while_the_reference_is_scored_and_then_another_clock(launch, tmp_path):
    """The clock of one process is a day behind, and at the resume a day ahead, which changes nothing."""
    code, said, seconds = launch({"full": 0, "left": 700}, "--precompute_ref_log_probs")
    assert code != 0 and seconds < 200
    assert "File too large" in said and "unexpected error" not in said and not (tmp_path / "out").exists()
    code, said, _ = launch({"clock": -86_400.0}, "--precompute_ref_log_probs")
    assert code == 0, said
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    more = ("--precompute_ref_log_probs", "--resume_from_checkpoint", "latest", "--max_steps", "6")
    code, said, _ = launch({"clock": 86_400.0}, *more)
    assert code == 0, said
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
