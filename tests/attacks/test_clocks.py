"""Clocks that are wrong: of another process, or set back in the middle of a run."""

import json
import os
import time

import numpy as np
import pytest
from transformers import TrainerCallback

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.cli import main
from trl_cpo.data.demo import model as demo
from trl_cpo.engine.reference.store import ScoreStore
from trl_cpo.engine.resume import checkpoints
from trl_cpo.files import schema

from helpers.tiny import hh_rows, pairs_dataset, training_options

DAY = 24 * 3600
OPTIONS = (
    "--use_cpu --bf16 False --max_steps 3 --logging_steps 1 --max_length 128 --price False --save_strategy steps --save_steps 1"
)


@pytest.fixture
def clock(monkeypatch):
    """A clock whose offset, in seconds, a test sets."""
    own, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: own() + offset[0])
    return offset


class SetsBack(TrainerCallback):
    def __init__(self, clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.clock[0] -= DAY


def faults(records) -> list[str]:
    return [fault for record in records for fault in schema.faults(record)]


def test_a_clock_set_back_while_training_leaves_no_negative_time(tmp_path, small_model, tokenizer, clock):
    def trainer() -> CPOConstrainedTrainer:
        args = CPOConstrainedConfig(
            **training_options(tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1),
            constraint="clip",
        )
        data = pairs_dataset()
        return CPOConstrainedTrainer(
            model=small_model,
            args=args,
            processing_class=tokenizer,
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            callbacks=[SetsBack(clock)],
        )

    first = trainer()
    first.train()
    seconds = [
        json.loads((tmp_path / f"checkpoint-{step}" / "trl_cpo_state.json").read_text())["seconds"] for step in (1, 2, 3)
    ]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < 600
    assert not faults(first.state.log_history)
    assert seconds[2] <= first.state.log_history[-1]["train_runtime"] < 600
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not faults(again.state.log_history)
    assert seconds[1] < again.state.log_history[-1]["train_runtime"] < 600


def test_a_clock_set_back_in_an_evaluation_gives_no_time_of_it(tmp_path, small_model, tokenizer, clock, monkeypatch):
    args = CPOConstrainedConfig(**training_options(tmp_path), constraint="clip")
    trainer = CPOConstrainedTrainer(
        model=small_model, args=args, processing_class=tokenizer, train_dataset=pairs_dataset(), eval_dataset=pairs_dataset(4)
    )
    assert trainer.evaluate()["eval_runtime"] > 0
    within = trainer.evaluation_loop
    monkeypatch.setattr(trainer, "evaluation_loop", lambda *a, **k: (within(*a, **k), clock.__setitem__(0, -DAY))[0])
    measured = trainer.evaluate()
    assert not faults([measured, *trainer.state.log_history])
    assert measured["eval_cpo/pairs"] == 4 and "eval_runtime" not in measured


def test_a_run_whose_clock_was_set_back_is_certified(tmp_path, small_model, clock, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh_rows(12, 0)))
    own = checkpoints.publish

    def publish(*names):
        clock[0] -= DAY
        return own(*names)

    monkeypatch.setattr(checkpoints, "publish", publish)
    command = ["train", "--model_name_or_path", small_model, "--dataset_name", "pairs.jsonl", "--output_dir", "out"]
    assert main([*command, *OPTIONS.split()]) == 0
    assert "took -" not in capsys.readouterr().out and clock[0] == -3 * DAY
    assert 0 < json.loads((tmp_path / "out" / "metrics.json").read_text())["seconds"] < 600
    assert main(["certify", "out"]) in (0, 1)
    assert "what cannot be" not in capsys.readouterr().err


def test_a_process_with_a_clock_ahead_removes_no_file_in_work(tmp_path, clock):
    store = ScoreStore(tmp_path, [np.arange(2)])
    in_work = tmp_path / ".000000.safetensors.1-aa.tmp"
    in_work.write_bytes(b"half")
    clock[0] = DAY
    store.open({})
    assert in_work.exists()


def test_a_process_with_a_clock_behind_still_removes_what_is_stale(tmp_path, clock):
    store = ScoreStore(tmp_path, [np.arange(2)])
    stale = tmp_path / ".000000.safetensors.1-aa.tmp"
    stale.write_bytes(b"half")
    os.utime(stale, (time.time() - DAY,) * 2)
    clock[0] = -2 * DAY
    store.open({})
    assert not stale.exists()


def test_a_process_with_a_clock_ahead_removes_no_conversion_in_work(tmp_path, clock):
    in_work = tmp_path / ".model.building-1-aa"
    in_work.mkdir()
    clock[0] = 3 * DAY
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    demo.build(tmp_path / "model", source, lambda source, folder: (folder / "weights").write_bytes(b"1") and None)
    assert in_work.exists() and (tmp_path / "model").is_dir()
