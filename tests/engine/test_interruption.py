"""SIGTERM: a checkpoint after the step in work, on all processes together, and a run that goes on as if nothing had come."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from trl_cpo.engine.interruption import Interruption, TrainingInterrupted
from trl_cpo.engine.resume.checkpoints import fault_of, newest_checkpoint
from trl_cpo.logs.run_log import read_log

from helpers.checkpoint_runs import DUAL, assert_same_end, trainer_of
from helpers.paths import PROCESSES
from helpers.tiny import pair_rows

pytestmark = [pytest.mark.filterwarnings("ignore:constraint=:UserWarning"), pytest.mark.usefixtures("no_model_cards")]
ALONE = SimpleNamespace(is_local_main_process=True)  # as much of an Accelerator as a signal asks for
SCRIPT = PROCESSES / "interrupt_together.py"


class Terminates(TrainerCallback):
    """Sends this process SIGTERM at a moment of a step, twice, as launchers do."""

    def __init__(self, step: int, moment: str):
        self._step = step
        setattr(self, moment, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    def on_save(self, args, state, control, **kwargs):
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()


@pytest.mark.parametrize(
    ("step", "moment", "saved_at", "options"),
    [
        (1, "on_substep_end", 2, {}),  # within a step
        (1, "on_step_begin", 2, {}),
        (2, "on_step_begin", 3, {}),  # a step after one that was saved as planned
        (2, "on_pre_optimizer_step", 3, {"save_strategy": "no"}),  # where transformers saves, before the step is made
        # An epoch's last step: its log and its evaluation are in the checkpoint.
        (2, "on_substep_end", 3, {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_steps": 100}),
        (3, "on_substep_end", 4, {"save_steps": 100}),  # the last step of all
        (
            1,
            "on_evaluate",
            2,
            {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss"},
        ),
    ],
    ids=["substep", "begin", "after", "optimizer", "epoch", "last", "evaluation"],
)
def test_terminated_and_resumed_is_uninterrupted(
    tmp_path,
    tokenizer,
    small_model,
    step,
    moment,
    saved_at,
    options,
    capfd,
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
    assert said.count("SIGTERM: training ends after the current step") == 1
    assert f"Ended by SIGTERM after step {saved_at}. Resume from {checkpoint}" in said
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    if options.get("save_strategy", "steps") == "steps" and options.get("save_steps", 2) == 2:
        assert_same_end(resumed, alone)  # the last checkpoint included
    logs = [
        [{k: v for k, v in r.items() if "runtime" not in k and "per_second" not in k} for r in trainer.state.log_history]
        for trainer in (resumed, alone)
    ]
    assert logs[0] == logs[1] and resumed.state.global_step == 4
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (resumed, alone))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_without_the_option_nothing_listens(tmp_path, tokenizer, small_model, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was set"))
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=1).train()


def test_in_another_thread_it_says_that_it_cannot_listen(tmp_path, tokenizer, small_model):
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=1, enable_jit_checkpoint=True)
    assert trainer.args.enable_jit_checkpoint
    said = []

    def train():
        with pytest.warns(UserWarning, match="outside the main thread.*SIGTERM will end this process at once"):
            trainer.train()
        said.append(trainer.state.global_step)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert said == [1]


def test_a_signal_that_comes_too_late_for_a_checkpoint_lets_training_end(tmp_path, tokenizer, small_model):
    trainer = trainer_of(
        tmp_path,
        small_model,
        tokenizer,
        constraint="clip",
        max_steps=1,
        save_strategy="no",
        enable_jit_checkpoint=True,
        callbacks=[Terminates(1, "on_train_end")],
    )
    trainer.train()
    trainer.train()  # which the signal was not for
    assert trainer.state.global_step == 1


def test_a_training_stopped_early_ends_as_it_would(tmp_path, tokenizer, small_model):
    """Resumed it would forget that it was to stop, and train on; so the script goes on as if no signal had come."""
    trainer = trainer_of(
        tmp_path,
        small_model,
        tokenizer,
        constraint="clip",
        enable_jit_checkpoint=True,
        stop=2,
        callbacks=[Terminates(1, "on_step_begin")],
    )
    trainer.train()
    assert trainer.state.global_step == 2 and newest_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_signal_between_the_trainings_of_a_search_ends_it(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("ended"))
    try:
        interruption = Interruption(ALONE, wanted=True)
        for more_follows in (False, True):
            with suppress(RuntimeError), interruption.listening(more_follows=more_follows):
                os.kill(os.getpid(), signal.SIGTERM)
                assert not seen
                raise RuntimeError
            assert seen == ["ended"] * more_follows
    finally:
        signal.signal(signal.SIGTERM, before)


def test_children_made_while_listening_can_be_ended():
    """They inherit the handler, under which `terminate` would do nothing, and be waited for without an end."""
    with Interruption(ALONE, wanted=True).listening(more_follows=False):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        while os.getpgid(child.pid) == os.getpgid(0):
            time.sleep(0.01)
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM


@contextmanager
def started(folder, *command, launch=0):
    head = [sys.executable]
    if launch:
        head += ["-m", "torch.distributed.run", f"--nproc_per_node={launch}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*head, *map(str, command)], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        # Not killed at once: a launcher's processes are in sessions of their own, and would stay.
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.parametrize("who", ["one", pytest.param("launcher", marks=pytest.mark.slow)])
def test_two_processes_end_at_the_same_step(tmp_path, small_model, who):
    """The signal reaches the second process alone, in an epoch's last step; or the launcher, which signals process groups.

    With the launcher a data loader's worker runs beside each process, and would end the training by its death.
    """
    job = {"model": small_model, "folder": str(tmp_path), "who": who}
    with started(tmp_path, SCRIPT, json.dumps(job), launch=2) as process:
        if who == "launcher":
            deadline = time.monotonic() + 200
            while not (tmp_path / "training").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.terminate()
        _, err = process.communicate(timeout=200)
    assert process.returncode != 0
    assert len(list(tmp_path.glob("ended*.json"))) == 2, err[-3000:]
    seen = [json.loads((tmp_path / f"ended{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1] and seen[0]["code"] == 143
    newest = newest_checkpoint(tmp_path / "run")
    assert newest.name == f"checkpoint-{seen[0]['step']}" and fault_of(newest) is None
    assert err.count("Ended by SIGTERM after step") == 1
    if who == "one":
        assert seen[0]["step"] == 2 and seen[0]["logged"] == [2]  # put off until the epoch's log was in it


@pytest.mark.slow
def test_the_command_ends_with_143_and_goes_on(tmp_path, small_model):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    command = [
        "-m",
        "trl_cpo",
        "train",
        "--model_name_or_path",
        small_model,
        "--dataset_name",
        rows,
        "--output_dir",
        "out",
        "--use_cpu",
        "--max_steps",
        "600",
        "--per_device_train_batch_size",
        "1",
        "--held_out",
        "2",
        "--save_strategy",
        "no",
        "--logging_steps",
        "1",
        "--enable_jit_checkpoint",
        "--report_to",
        "none",
    ]
    with started(tmp_path, *command) as process:
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
    with started(tmp_path, *command, "--resume_from_checkpoint", "latest") as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert (tmp_path / "out" / "metrics.json").exists()
    steps = [record["step"] for record in read_log(tmp_path / "out" / "log.jsonl") if "loss" in record]
    assert steps == list(range(1, step + 3))
