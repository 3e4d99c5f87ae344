"""SIGTERM: a checkpoint after the step in work, on all processes together, and a run that goes on as if nothing had come."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import pair_rows
from test_checkpoints import DUAL, assert_same_end, no_model_cards, small_model, trainer_of  # noqa: F401
from transformers import TrainerCallback

from trl_cpo.checkpoints import fault_of, newest_checkpoint
from trl_cpo.interruption import TrainingInterrupted
from trl_cpo.progress import read_log

pytestmark = pytest.mark.filterwarnings("ignore:constraint=:UserWarning")
SCRIPT = Path(__file__).parent / "interrupt_together.py"


class Terminates(TrainerCallback):
    """Sends this process SIGTERM at a moment of a step, twice, as launchers do."""

    def __init__(self, step: int, moment: str):
        self._step = step
        setattr(self, moment, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "moment", "saved_at", "options"),
    [
        (1, "on_substep_end", 2, {}),  # within a step
        (1, "on_step_begin", 2, {}),
        (2, "on_pre_optimizer_step", 3, {"save_strategy": "no"}),  # where transformers saves, before the step is made
        # An epoch's last step: its log and its evaluation are in the checkpoint.
        (2, "on_substep_end", 3, {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_steps": 100}),
        (3, "on_substep_end", 4, {"save_steps": 100}),  # the last step of all
        (1, "on_evaluate", 2, {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss"}),
    ],
    ids=["substep", "begin", "optimizer", "epoch", "last", "evaluation"],
)  # fmt: skip
def test_terminated_and_resumed_is_uninterrupted(
    tmp_path, tokenizer, small_model, step, moment, saved_at, options, capfd  # noqa: F811
):
    options = {**DUAL, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "lora": True, **options}
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    options["enable_jit_checkpoint"] = True
    handler = signal.getsignal(signal.SIGTERM)
    ended = trainer_of(tmp_path / "resumed", small_model, tokenizer, callbacks=[Terminates(step, moment)], **options)
    with pytest.raises(TrainingInterrupted) as interruption:
        ended.train()
    assert signal.getsignal(signal.SIGTERM) is handler
    checkpoint = tmp_path / "resumed" / f"checkpoint-{saved_at}"
    assert interruption.value.code == 143
    assert (interruption.value.step, interruption.value.checkpoint) == (saved_at, str(checkpoint))
    assert newest_checkpoint(tmp_path / "resumed") == checkpoint and fault_of(checkpoint) is None
    said = capfd.readouterr().err
    assert said.count("SIGTERM: training ends after the step in work") == 1
    assert f"Ended by SIGTERM after step {saved_at}. Go on from {checkpoint}" in said
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    if options.get("save_strategy", "steps") == "steps" and options.get("save_steps", 2) == 2:
        assert_same_end(resumed, alone)  # the last checkpoint included
    logs = [[{k: v for k, v in r.items() if "runtime" not in k and "per_second" not in k} for r in trainer.state.log_history]
            for trainer in (resumed, alone)]  # fmt: skip
    assert logs[0] == logs[1] and resumed.state.global_step == 4
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (resumed, alone))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_without_the_option_nothing_listens(tmp_path, tokenizer, small_model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was set"))
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=1).train()


def test_in_another_thread_it_says_that_it_cannot_listen(tmp_path, tokenizer, small_model):  # noqa: F811
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=1, enable_jit_checkpoint=True)
    assert trainer.args.enable_jit_checkpoint
    said = []

    def train():
        with pytest.warns(UserWarning, match="in another one. SIGTERM ends this process at once"):
            trainer.train()
        said.append(trainer.state.global_step)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert said == [1]


def test_a_signal_that_comes_too_late_for_a_checkpoint_lets_training_end(tmp_path, tokenizer, small_model):  # noqa: F811
    trainer = trainer_of(
        tmp_path, small_model, tokenizer, constraint="clip", max_steps=1, save_strategy="no", enable_jit_checkpoint=True,
        callbacks=[Terminates(1, "on_train_end")],
    )  # fmt: skip
    trainer.train()
    trainer.train()  # which the signal was not for
    assert trainer.state.global_step == 1


def start(folder, *command, launch=0):
    head = [sys.executable]
    if launch:
        head += ["-m", "torch.distributed.run", f"--nproc_per_node={launch}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*head, *map(str, command)], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("who", ["one", "launcher"])
def test_two_processes_end_at_the_same_step(tmp_path, small_model, who):  # noqa: F811
    """The signal reaches the second process alone, or the launcher, which hands it on when and as it likes."""
    job = {"model": small_model, "folder": str(tmp_path), "who": who}
    process = start(tmp_path, SCRIPT, json.dumps(job), launch=2)
    if who == "launcher":
        deadline = time.monotonic() + 200
        while not (tmp_path / "training").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0
    seen = [json.loads((tmp_path / f"ended{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1] and seen[0]["code"] == 143, err[-3000:]
    newest = newest_checkpoint(tmp_path / "run")
    assert newest.name == f"checkpoint-{seen[0]['step']}" and fault_of(newest) is None
    assert err.count("Ended by SIGTERM after step") == 1
    if who == "one":
        assert seen[0]["step"] == 2


def test_the_command_ends_with_143_and_goes_on(tmp_path, small_model):  # noqa: F811
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    command = [
        "-m", "trl_cpo", "train", "--model_name_or_path", small_model, "--dataset_name", rows, "--output_dir", "out",
        "--use_cpu", "--max_steps", "600", "--per_device_train_batch_size", "1", "--held_out", "2", "--save_strategy", "no",
        "--logging_steps", "1", "--enable_jit_checkpoint", "--report_to", "none",
    ]  # fmt: skip
    process = start(tmp_path, *command)
    for line in process.stdout:
        if line.startswith("step     3/600 train"):
            break
    process.terminate()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 143, err[-3000:]
    assert "Ended by SIGTERM after step" in err and "Traceback" not in err
    newest = newest_checkpoint(tmp_path / "out")
    step = int(newest.name.split("-")[1])
    assert 3 <= step < 600 and fault_of(newest) is None and not (tmp_path / "out" / "metrics.json").exists()
    command[command.index("600")] = str(step + 2)
    process = start(tmp_path, *command, "--resume_from_checkpoint", "latest")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert (tmp_path / "out" / "metrics.json").exists()
    steps = [record["step"] for record in read_log(tmp_path / "out" / "log.jsonl") if "loss" in record]
    assert steps == list(range(1, step + 3))
