"""Checkpoints: whole or not there, and a resumed run is the uninterrupted one, number for number."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import HPSearchBackend, rotate_checkpoints
from trl import DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl.training_loop import load_loop_state
from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.engine.resume import checkpoints
from trl_cpo.engine.resume import resumption as resume
from trl_cpo.engine.resume.checkpoints import CheckpointError, clean_up, fault_of, newest_checkpoint, staging, whole_checkpoints
from trl_cpo.logs.run_log import RunLog, read_log
from trl_cpo.metrics import METRICS, MetricLedger
from trl_cpo.run.training import checkpoint_of

from helpers.checkpoint_runs import DUAL, assert_same_end, trainer_of
from helpers.comparisons import same, without_timings
from helpers.paths import PROCESSES
from helpers.tiny import pairs_dataset

# tests/data/test_validation.py tests the warnings about unused hyperparameters and about inverse_logp.
pytestmark = [pytest.mark.filterwarnings("ignore:constraint=:UserWarning"), pytest.mark.usefixtures("no_model_cards")]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_resumed_is_uninterrupted(tmp_path, tokenizer, small_model, constraint, lora):
    """From the middle of an epoch and of a logging window: weights, optimizer, schedule, random states, λ, every log.

    Every constraint meets full and LoRA, a reference live and precomputed; each of these pairs meets every second constraint.
    """
    precompute = bool((list(CONSTRAINTS).index(constraint) + lora) % 2)
    options = dict(constraint=constraint, lora=lora, precompute_ref_log_probs=precompute)
    if CONSTRAINTS[constraint](beta=0.1).dual_rule:
        options |= DUAL
    if CONSTRAINTS[constraint](beta=0.1).faults():
        options |= dict(logps_reduction="mean")
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    # Its second step's checkpoint is what a run that was killed after that step has left.
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "alone" / "checkpoint-2"))
    assert_same_end(resumed, alone)
    assert not staging(tmp_path / "alone").exists()


@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_accumulation_steps=2, per_device_train_batch_size=1),
        dict(balance_tokens=True, gradient_accumulation_steps=2, per_device_train_batch_size=1),
        dict(tokens_per_step=70, gradient_accumulation_steps=2),
        dict(dataloader_num_workers=1),
        dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5),
        dict(eval_strategy="steps", eval_steps=1, eval_on_start=True, lora=True),
        dict(data=IterableDataset.from_generator(lambda: iter(pairs_dataset(12)))),
        dict(max_grad_norm=0.0, optim="sgd", include_num_input_tokens_seen="all"),
        dict(disable_dropout=False, lora=True, constraint="none"),
    ],
    ids=lambda options: next(iter(options)),
)
def test_resumed_is_uninterrupted_with(tmp_path, tokenizer, small_model, options):
    options = {"constraint": "clip", **options}
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "alone" / "checkpoint-2"))
    assert_same_end(resumed, alone)


@pytest.mark.parametrize(("step", "accumulation"), [(4, 1), (6, 1), (4, 2)])
def test_a_stream_is_resumed_in_its_second_pass(tmp_path, tokenizer, small_model, step, accumulation):
    """transformers skips all batches so far in one pass, which is over before, and goes on with others.

    Three batches a pass; with accumulation the third is left over and goes into the first step of the next pass.
    """
    data = IterableDataset.from_generator(lambda: iter(pairs_dataset(6)))
    options = {**DUAL, "data": data, "max_steps": 8, "gradient_accumulation_steps": accumulation}
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "alone" / f"checkpoint-{step}"))
    assert_same_end(resumed, alone)
    assert alone.state.epoch > 1


def test_the_seconds_before_count(tmp_path, tokenizer, small_model):
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=4).train()
    file = tmp_path / "checkpoint-2" / checkpoints.STATE_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 1000.0}))
    resumed = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=4)
    assert 1000 < resumed.train(resume_from_checkpoint=str(file.parent)).metrics["train_runtime"] < 2000


def test_stopped_twice_and_resumed_from_the_newest(tmp_path, tokenizer, small_model):
    """Stopped after steps 3 and 5, each time a step beyond a checkpoint; the first one is the end of an epoch."""
    options = {**DUAL, "save_steps": 1, "max_steps": 7, "save_total_limit": 2}
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    for stop in (3, 5):
        trainer_of(tmp_path / "run", small_model, tokenizer, stop=stop, **options).train(resume_from_checkpoint=stop > 3)
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    resumed = trainer_of(tmp_path / "run", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, alone)


@pytest.mark.parametrize("step", [3, 5])
@pytest.mark.parametrize("strategy", ["eval_strategy", "logging_strategy"])
def test_what_an_epochs_end_adds_is_in_the_checkpoint_of_its_last_step(tmp_path, tokenizer, small_model, strategy, step):
    """Else a kill during an epoch's evaluation would lose it: the checkpoint of step 3 was written before it."""
    options = dict(constraint="clip", save_steps=1, max_steps=5, **{strategy: "epoch"})
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    shutil.copytree(tmp_path / "alone" / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}")
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, alone)
    name = "eval_loss" if strategy == "eval_strategy" else "loss"
    assert [r["step"] for r in resumed.state.log_history if name in r and (name != "loss" or r["step"] in (3, 5))] == [3, 5]


class SaveOnLog(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        control.should_save = True


@pytest.mark.parametrize("asks", ["best", "callback"])
def test_a_checkpoint_asked_for_late_waits_for_the_epochs_end_too(tmp_path, tokenizer, small_model, asks):
    """By an evaluation that is the best so far, or by a callback after it: the epoch's log has yet to come."""
    options = dict(constraint="clip", max_steps=5, logging_strategy="epoch", eval_strategy="steps", eval_steps=1)
    if asks == "best":
        options |= dict(save_strategy="best", metric_for_best_model="eval_loss", greater_is_better=False)
    else:
        options |= dict(save_strategy="no", callbacks=[SaveOnLog()])
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    assert 3 in whole_checkpoints(tmp_path / "alone"), "the options no longer ask for a checkpoint of the epoch's last step"
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "alone" / "checkpoint-3"))
    logs = [[without_timings(record) for record in trainer.state.log_history] for trainer in (resumed, alone)]
    assert logs[0] == logs[1] and [r["step"] for r in logs[0] if "loss" in r] == [3, 5]
    assert all("cpo/gap" in r for r in logs[0] if "loss" in r), "though an evaluation came between the step and its log"


def test_a_finished_run_is_not_trained_further(tmp_path, tokenizer, small_model):
    """In the middle of an epoch transformers' own loop makes one step more; ours makes none, and says the same summary."""
    counts = {}
    for plain in (True, False):
        folder = tmp_path / str(plain)
        extra = {} if plain else {"constraint": "none"}
        with warnings.catch_warnings():
            trainer_of(folder, small_model, tokenizer, plain=plain, **extra).train()
            again = trainer_of(folder, small_model, tokenizer, plain=plain, **extra)
            again.train(resume_from_checkpoint=True)
        counts[plain] = again.state.global_step
        if not plain:
            alone = trainer_of(tmp_path / "alone", small_model, tokenizer, constraint="none")
            alone.train()
            logs = [[without_timings(record) for record in trainer.state.log_history] for trainer in (again, alone)]
            assert logs[0] == logs[1], "the summary has the metrics since the last log"
    assert counts == {True: 5, False: 4}, "if plain is 4, transformers has changed and _run_epoch need not be overridden"


def test_the_ledger_continues_exactly():
    rows = torch.rand(7, 4, len(METRICS), generator=torch.Generator().manual_seed(0)) * 100
    whole, first, second = MetricLedger(), MetricLedger(), MetricLedger()
    for batch in rows:
        whole.add(batch)
    for batch in rows[:3]:
        first.add(batch)
    second.add(rows[0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in rows[3:]:
        second.add(batch)
    assert second.state_dict() == whole.state_dict() and second.flush() == whole.flush() != {}
    assert second.flush() == {} and second.state_dict()["count"] == 0
    with pytest.raises(ValueError, match="metrics are not this version's: gap"):
        second.load_state_dict({"count": 1, "sums": {name: [0.0] for name in METRICS if name != "gap"}})


# Folders


def fake_checkpoint(run_dir: Path, step: int, content: bytes = b"w") -> Path:
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content * 10)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    checkpoints.write_state(folder, {"format": 1})
    return folder


class Killed(BaseException):
    """Stands in for SIGKILL: nothing of ours may catch it and go on."""


def killed_at(monkeypatch, moment: int):
    """Has the `moment`-th change to the disk end the process: a rename before it is made, a deletion in its middle."""
    count, rename, rmtree = iter(range(10**6)), os.rename, shutil.rmtree

    def tick():
        if next(count) == moment:
            raise Killed

    def dying_rename(source, target):
        tick()
        rename(source, target)

    def dying_rmtree(path, ignore_errors=False, **kwargs):
        if next(count) == moment:
            for file in sorted(Path(path).rglob("*"))[::2]:
                if file.is_file():
                    file.unlink()
            raise Killed
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(os, "rename", dying_rename)
    monkeypatch.setattr(shutil, "rmtree", dying_rmtree)


@pytest.mark.parametrize("moment", range(9))
def test_killed_at_every_change_of_the_disk(tmp_path, monkeypatch, moment):
    """A checkpoint replaces one of its step, and the oldest goes: folders are whole throughout, none finished is lost."""
    for step in (2, 4, 6):
        fake_checkpoint(tmp_path, step)
    fake_checkpoint(staging(tmp_path), 6, b"new")
    with monkeypatch.context() as patch:
        killed_at(patch, moment)
        try:
            checkpoints.publish(tmp_path, "checkpoint-6")
            for folder in checkpoints.excess_checkpoints(tmp_path, 2):
                checkpoints.remove(folder)
            finished = True
        except Killed:
            finished = False
    assert all(fault_of(folder) is None for folder in tmp_path.glob("checkpoint-*"))
    clean_up(tmp_path)
    assert {4, 6} <= whole_checkpoints(tmp_path).keys() and not staging(tmp_path).exists()
    assert finished == (moment >= 6), "the number of moments has changed: test them all"
    if finished:
        assert (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes() == b"new" * 10
        assert list(whole_checkpoints(tmp_path)) == [4, 6]


def test_a_checkpoint_in_place_never_makes_room_for_one_that_another_machine_has_moved(tmp_path):
    fake_checkpoint(tmp_path, 6)
    staging(tmp_path).mkdir()
    with pytest.raises(checkpoints.NotStaged):
        checkpoints.publish(tmp_path, "checkpoint-6")
    assert list(whole_checkpoints(tmp_path)) == [6]


def test_a_folder_above_a_run_may_have_any_name(tmp_path):
    run = tmp_path / checkpoints.UNFINISHED / "project" / "run"
    run.mkdir(parents=True)
    fake_checkpoint(run, 6)
    assert list(whole_checkpoints(run)) == [6]
    fake_checkpoint(staging(run), 8)
    assert "while writing or deleting it" in fault_of(staging(run) / "checkpoint-8")
    assert f"Resume from {run / 'checkpoint-6'}" in str(checkpoints.refusal(staging(run) / "checkpoint-8", "x"))


def test_a_damaged_checkpoint_is_no_trace_of_a_run_that_never_saved(tmp_path):
    staging(tmp_path).mkdir()
    (tmp_path / "log.jsonl").touch()
    assert checkpoints.is_fresh(tmp_path)
    fake_checkpoint(tmp_path, 6)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    assert not whole_checkpoints(tmp_path) and not checkpoints.is_fresh(tmp_path)
    latest = SimpleNamespace(resume_from_checkpoint="latest", chose_output_dir=True, output_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match="checkpoint-6: it has no trainer_state.json.* train from the start"):
        checkpoint_of(latest)


def test_what_a_run_leaves_that_was_killed_before_its_first_checkpoint_is_no_obstacle(tmp_path):
    for name in ("_unfinished", "runs"):  # the latter is tensorboard's
        (tmp_path / name).mkdir()
    for name in ("log.jsonl", "README.md"):
        (tmp_path / name).touch()
    assert checkpoints.is_fresh(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert not checkpoints.is_fresh(tmp_path)


def test_a_checkpoint_is_on_the_disk_before_it_is_in_its_place(tmp_path, tokenizer, small_model, monkeypatch):
    paths, happened = {}, []
    opened, fsync, rename = os.open, os.fsync, os.rename

    def traced_open(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        paths[descriptor] = str(path)
        return descriptor

    def traced_rename(source, target):
        happened.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "open", traced_open)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (happened.append(("sync", paths.get(descriptor))), fsync(descriptor)))
    monkeypatch.setattr(os, "rename", traced_rename)
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=2).train()
    moved = happened.index(("rename", str(tmp_path / "checkpoint-2")))
    staged = staging(tmp_path) / "checkpoint-2"
    names = [path.name for path in (tmp_path / "checkpoint-2").iterdir()]
    assert {("sync", str(staged)), *(("sync", str(staged / name)) for name in names)} <= set(happened[:moved])
    assert ("sync", str(tmp_path)) in happened[moved:], "the rename itself"


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(1, 40), unique=True, max_size=6),
    limit=st.one_of(st.none(), st.integers(-1, 5)),
    best=st.one_of(st.none(), st.integers(1, 40)),
)
def test_the_checkpoints_that_go_are_those_that_transformers_would_delete(tmp_path_factory, steps, limit, best):
    """Were clocks right, that is: they go by file times, and we by the order in which checkpoints say they were written."""
    run_dir = tmp_path_factory.mktemp("rotation")
    for age, step in enumerate(steps):
        (run_dir / f"checkpoint-{step}").mkdir()
        checkpoints.write_state(run_dir / f"checkpoint-{step}", {"order": age + 1})
        os.utime(run_dir / f"checkpoint-{step}", (10 * age, 10 * age))
    best = None if best is None else str(run_dir / f"checkpoint-{best}")
    going = {path.name for path in checkpoints.excess_checkpoints(run_dir, limit, best)}
    before = set(os.listdir(run_dir))
    rotate_checkpoints(str(run_dir), limit, best, use_mtime=True)
    assert going == before - set(os.listdir(run_dir))
    shutil.rmtree(run_dir)


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "of version 0.1.0"])
def test_a_clock_that_goes_back_deletes_no_new_checkpoint(tmp_path, tokenizer, small_model, no_model_cards, plain):
    """Checkpoints dated tomorrow are older than those that a resumed run writes, and the newest is the last written."""
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=4, save_total_limit=2).train()
    tomorrow = time.time() + 86400
    for folder in tmp_path.glob("checkpoint-*"):
        if plain:
            state = checkpoints.read_state(folder)
            del state["order"]
            checkpoints.write_state(folder, state)
        for path in (folder, *folder.iterdir()):
            os.utime(path, (tomorrow, tomorrow))
    resumed = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=8, save_total_limit=2)
    with pytest.warns(UserWarning, match="max_steps was 4"):
        resumed.train(resume_from_checkpoint=True)
    assert list(whole_checkpoints(tmp_path)) == [6, 8]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def test_the_newest_is_the_last_runs_whatever_its_files_say(tmp_path, tokenizer, small_model, no_model_cards):
    """A second run from the start, in the same folder, on a machine whose clock is behind."""
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=4).train()
    with pytest.warns(UserWarning, match="holds checkpoints of an earlier run"):
        trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=2).train()
    for path in (tmp_path / "checkpoint-2", *(tmp_path / "checkpoint-2").iterdir()):
        os.utime(path, (1, 1))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def break_nothing(folder: Path):
    pass


def half_weights(folder: Path):
    (folder / "model.safetensors").write_bytes(b"w" * 5)


def no_optimizer(folder: Path):
    (folder / "optimizer.pt").unlink()


def torn_state(folder: Path):
    text = (folder / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(text[: len(text) // 2])


def no_state(folder: Path):
    (folder / "trainer_state.json").unlink()


def torn_own_state(folder: Path):
    (folder / "trl_cpo_state.json").write_text('{"format": 1,')


def torn_into_depth(folder: Path):
    (folder / "trainer_state.json").write_text("[" * 100_000)


def of_another_format(folder: Path):
    (folder / "trl_cpo_state.json").write_text('{"files": {}}')


def no_weights(folder: Path):
    (folder / "trl_cpo_state.json").unlink()
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_nothing, None),
        (half_weights, "model.safetensors has 5 bytes, expected 10"),
        (no_optimizer, "optimizer.pt is missing"),
        (torn_state, "trainer_state.json cannot be read"),
        (no_state, "has no trainer_state.json"),
        (torn_own_state, "trl_cpo_state.json cannot be read"),
        (torn_into_depth, "trainer_state.json cannot be read"),
        (of_another_format, "has format None; this version of trl-cpo reads format 1"),
        (no_weights, "holds no weights"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_whole_is_seen_and_not_picked(tmp_path, damage, words):
    for step in (2, 10):
        folder = fake_checkpoint(tmp_path, step)
        (folder / "optimizer.pt").write_bytes(b"o" * 7)
        checkpoints.write_state(folder, {"format": 1})
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-12.bak").mkdir()
    damage(folder)
    fault = fault_of(folder)
    assert fault is None if words is None else words in fault
    assert newest_checkpoint(tmp_path) == tmp_path / ("checkpoint-10" if words is None else "checkpoint-2")
    if words:
        text = str(checkpoints.refusal(folder, fault))
        assert words in text and f"Resume from {tmp_path / 'checkpoint-2'}, the newest complete checkpoint" in text
        assert "train from the start" in str(checkpoints.refusal(tmp_path / "empty" / "checkpoint-1", "no"))


def test_a_model_card_may_be_edited(tmp_path):
    folder = fake_checkpoint(tmp_path, 2)
    (folder / "README.md").write_text("mine")
    (folder / "config.json").write_text("{}")
    assert fault_of(folder) is None


def test_a_half_written_checkpoint_is_refused_before_the_model_is_touched(tmp_path, tokenizer, small_model, monkeypatch):
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="none", stop=4)
    trainer.train()
    no_state(tmp_path / "checkpoint-4")
    shutil.copytree(tmp_path / "checkpoint-2", staging(tmp_path) / "checkpoint-3")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    monkeypatch.setattr(CPOConstrainedTrainer, "_load_from_checkpoint", lambda *_: pytest.fail("touched"))
    newest = rf"Resume from {tmp_path / 'checkpoint-2'}, the newest complete checkpoint there"
    with pytest.raises(CheckpointError, match=f"(?s)checkpoint-4: it has no trainer_state.json.*{newest}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(CheckpointError, match=f"(?s)there is no such folder.*{newest}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer._resumption.prepare(True) == str(tmp_path / "checkpoint-2")
    assert not staging(tmp_path).exists(), "what a killed run left is cleared"
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="no complete checkpoint in .* call train\\(\\) without"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer._resumption.prepare(False) is None and trainer._resumption.prepare(None) is None


def test_staged_checkpoints_are_not_resumed_from(tmp_path):
    folder = fake_checkpoint(staging(tmp_path), 4)
    assert "while writing or deleting it" in fault_of(folder)
    fake_checkpoint(tmp_path, 2)
    assert f"Resume from {tmp_path / 'checkpoint-2'}, the newest complete checkpoint" in str(checkpoints.refusal(folder, "x"))


# The trainer's side


def test_the_best_checkpoint_is_named_where_it_is(tmp_path, tokenizer, small_model):
    """In memory and in each trainer_state.json, as plain DPOTrainer names it; and it is the model that is loaded at the end."""
    states, models = {}, {}
    for plain in (True, False):
        folder = tmp_path / ("plain" if plain else "ours")
        trainer = trainer_of(
            folder,
            small_model,
            tokenizer,
            plain=plain,
            eval_strategy="steps",
            eval_steps=2,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_rewards/margins",
            greater_is_better=False,
            max_steps=6,
            **({} if plain else {"constraint": "none"}),
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(folder / f"checkpoint-{trainer.state.best_global_step}")
        named = {}
        for path in sorted(folder.glob("checkpoint-*")):
            best = json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"]
            named[path.name] = Path(best).relative_to(folder).as_posix()
        states[plain], models[plain] = (trainer.state.best_metric, named), trainer.model.state_dict()
    assert states[True] == states[False] and same(dict(models[True]), dict(models[False]))
    assert states[False][1]


def test_the_old_checkpoint_goes_when_the_new_one_is_in_place(tmp_path, tokenizer, small_model, monkeypatch):
    there = []
    publish, remove = checkpoints.publish, checkpoints.remove

    def seen(action):
        def wrapped(*args):
            there.append((action.__name__, *sorted(path.name for path in tmp_path.glob("checkpoint-*"))))
            action(*args)
            assert not staging(tmp_path).exists()

        return wrapped

    monkeypatch.setattr(checkpoints, "publish", seen(publish))
    monkeypatch.setattr(checkpoints, "remove", seen(remove))
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip", save_total_limit=1).train()
    assert there == [
        ("publish",),
        ("publish", "checkpoint-2"),
        ("remove", "checkpoint-2", "checkpoint-4"),
    ]
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-4"]


def test_uploads_are_of_the_checkpoint_in_place(tmp_path, tokenizer, small_model, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append((folder, fault_of(folder)))

    monkeypatch.setattr(CPOConstrainedTrainer, "_push_from_checkpoint", push)
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / "checkpoint-2"), None)]
    # The arguments that lie in it are those of the run.
    assert torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False).push_to_hub


def test_a_trial_of_a_search_has_checkpoints_of_its_own(tmp_path, tokenizer, small_model):
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=1)
    trainer.train()
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer._save_checkpoint(trainer.model, trial=SimpleNamespace(number=3))
    assert whole_checkpoints(tmp_path / "run-3").keys() == {1} and not staging(tmp_path / "run-3").exists()


def test_an_error_while_saving_leaves_the_trainer_as_it_was(tmp_path, tokenizer, small_model, monkeypatch):
    """A full disk, say: no checkpoint, the error as it is, and the next attempt saves."""
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=1, save_strategy="no")
    trainer.train()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*")) and staging(tmp_path).is_dir()
    trainer._save_checkpoint(trainer.model, None)
    assert list(whole_checkpoints(tmp_path)) == [1] and not staging(tmp_path).exists()


def test_a_checkpoint_of_plain_trl_is_resumed_as_trl_does(tmp_path, tokenizer, small_model):
    theirs = trainer_of(tmp_path / "plain", small_model, tokenizer, plain=True)
    theirs.train()
    again = trainer_of(tmp_path / "again", small_model, tokenizer, plain=True)
    again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    ours = trainer_of(tmp_path / "ours", small_model, tokenizer, constraint="none")
    with pytest.warns(UserWarning, match="was not written by trl-cpo. As in TRL, train_loss .*num_tokens .* start from zero"):
        ours.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    for a, b in zip(again.state.log_history, ours.state.log_history, strict=True):
        b = {k: v for k, v in b.items() if not k.startswith("cpo/")}
        assert without_timings(a) == without_timings(b)
    assert same(dict(again.model.state_dict()), dict(ours.model.state_dict()))


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (DUAL, dict(constraint="clip"), "constraint was 'lagrangian' and is 'clip'.* its dual state is not used"),
        (
            dict(constraint="clip"),
            DUAL,
            "(?s)was 'clip' and is 'lagrangian'.* it holds no dual state: the multiplier starts from dual_init",
        ),
        (
            dict(constraint="clip"),
            dict(constraint="clip", gamma=2.0),
            "gamma was 0.5 and is 2.0. Training uses the new settings",
        ),
        (
            dict(constraint="clip", save_only_model=True),
            dict(constraint="clip"),
            "optimizer and the schedule start from scratch",
        ),
    ],
    ids=["dual to none", "none to dual", "gamma", "weights alone"],
)
def test_another_runs_checkpoint_is_taken_with_a_warning(tmp_path, tokenizer, small_model, first, then, words):
    trainer_of(tmp_path, small_model, tokenizer, max_steps=2, **first).train()
    trainer = trainer_of(tmp_path, small_model, tokenizer, **then)
    with pytest.warns(UserWarning, match="Resuming from") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert re.search(words, " ".join(str(w.message) for w in caught))
    assert trainer.state.global_step == 4


def test_whatever_else_was_changed_is_named(tmp_path, tokenizer, small_model):
    """Everything that weights depend on: losses, schedule, optimizer, data; and nothing about where results go."""
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip").train()
    changed = dict(ld_alpha=0.5, adam_beta1=0.8, warmup_steps=1, max_length=500, max_steps=5)
    with pytest.warns(UserWarning, match="Resuming from") as caught:
        trainer_of(
            tmp_path, small_model, tokenizer, constraint="clip", data=pairs_dataset(6, seed=3), **changed
        )._resumption.prepare(str(tmp_path / "checkpoint-2"))
    text = " ".join(str(w.message) for w in caught)
    assert all(re.search(f"{name} was .* and is {value}", text) for name, value in changed.items())
    assert "the training pairs have changed: in number (6 then, 6 now" in text
    elsewhere = dict(run_name="other", logging_steps=1, save_steps=1, save_total_limit=3, dataloader_num_workers=1)
    again = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", **elsewhere)
    assert again._resumption.prepare(str(tmp_path / "checkpoint-2"))


def test_every_option_of_which_nothing_depends_is_one(tmp_path):
    from trl_cpo.engine.resume.settings import NOT_AFFECTING_WEIGHTS

    assert CPOConstrainedConfig.__dataclass_fields__.keys() >= NOT_AFFECTING_WEIGHTS


def test_the_checkpoints_of_an_earlier_run_are_told_apart(tmp_path, tokenizer, small_model):
    """Else the earlier one's last checkpoint would end the later one before its first step."""
    options = dict(constraint="clip", save_steps=1)
    trainer_of(tmp_path, small_model, tokenizer, **options).train()
    later = trainer_of(tmp_path, small_model, tokenizer, stop=2, **options, data=pairs_dataset(6, seed=3))
    with pytest.warns(UserWarning, match=r"earlier run \(the newest is checkpoint-4\), but this run starts from the beginning"):
        later.train()
    assert list(whole_checkpoints(tmp_path)) == [1, 2, 3, 4] and newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    resumed = trainer_of(tmp_path, small_model, tokenizer, **options, data=pairs_dataset(6, seed=3))
    resumed.train(resume_from_checkpoint="latest")
    assert [r["step"] for r in resumed.state.log_history if "loss" in r] == [3]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4", "replaced by the later run's"


def test_a_multiplier_that_the_checkpoint_does_not_hold_starts_anew(tmp_path, tokenizer, small_model):
    trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=2).train()
    trainer = trainer_of(tmp_path, small_model, tokenizer, **DUAL)
    trainer._bounds.multipliers["dual"].parts[""].value = 5.0
    with pytest.warns(UserWarning, match="Resuming from") as caught:
        trainer._resumption.prepare(True)
    assert "it holds no dual state: the multiplier starts from dual_init" in " ".join(str(w.message) for w in caught)
    assert trainer._bounds.multipliers["dual"].parts[""].value == 0.0


# Several machines, as one process sees the others' answers


def others_say(monkeypatch, answer):
    """Has every `gather_object` of the next lines give another process's answer after this one's."""
    monkeypatch.setattr(resume, "gather_object", lambda mine: [*mine, answer(mine[0])])


def test_the_newest_is_what_all_machines_have(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        fake_checkpoint(tmp_path, step)
    others_say(monkeypatch, lambda mine: [2, 4])
    latest = SimpleNamespace(resume_from_checkpoint="latest", chose_output_dir=True, output_dir=str(tmp_path))
    assert resume.newest_everywhere(tmp_path) == tmp_path / "checkpoint-4"
    assert checkpoint_of(latest) == str(tmp_path / "checkpoint-4")
    others_say(monkeypatch, lambda mine: [8])
    assert resume.newest_everywhere(tmp_path) is None


def test_what_another_process_cannot_resume_from_is_refused_here_too(tmp_path, tokenizer, small_model, monkeypatch):
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=2)
    trainer.train()
    given = str(tmp_path / "checkpoint-2")
    others_say(monkeypatch, lambda mine: ("elsewhere/checkpoint-2", "it holds no weights", 2))
    with pytest.raises(CheckpointError, match="Cannot resume from elsewhere/checkpoint-2: it holds no weights"):
        trainer._resumption.prepare(given)
    others_say(monkeypatch, lambda mine: ("elsewhere/checkpoint-4", None, 4))
    with pytest.raises(CheckpointError, match=r"different steps. process 0: .*\(step 2\); process 1: .*-4 \(step 4\)"):
        trainer._resumption.prepare(given)


def test_a_checkpoint_that_is_not_whole_somewhere_ends_training_at_once(tmp_path, tokenizer, small_model, monkeypatch):
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", max_steps=2)
    monkeypatch.setattr(checkpoints, "fault_within", lambda folder: "it holds no weights")
    with pytest.raises(
        CheckpointError, match="checkpoint-2 was just written .*: on process 0, it holds no weights. It stays in"
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")) and (staging(tmp_path) / "checkpoint-2").is_dir()


@pytest.mark.parametrize("each", [True, False])
def test_each_machine_has_the_weights_where_they_are_asked_for(tmp_path, tokenizer, small_model, monkeypatch, each):
    """`save_pretrained` writes no weights on any process but the first, whatever `save_on_each_node` says."""
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", save_on_each_node=each)
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    trainer._save(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    assert (tmp_path / "saved" / "model.safetensors").exists() == each
    assert "should_save_on_this_rank" not in vars(trainer.model)


def test_a_multiplier_beyond_the_cap_is_refused_before_the_model_is_touched(tmp_path, tokenizer, small_model, monkeypatch):
    trainer_of(tmp_path, small_model, tokenizer, max_steps=2, **{**DUAL, "dual_init": 4.0}).train()
    trainer = trainer_of(tmp_path, small_model, tokenizer, **{**DUAL, "dual_max": 1.0})
    monkeypatch.setattr(CPOConstrainedTrainer, "_load_from_checkpoint", lambda *_: pytest.fail("touched"))
    with pytest.raises(ValueError, match="Raise dual_max"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("processes", "index", "loss"), [(2, 0, 1.0), (2, 1, 4.0), (1, 0, 2.5), (3, 2, 2.5)])
def test_counters_of_two_processes_go_to_as_many_or_to_others(processes, index, loss):
    """Each takes up its own loss; where their number has changed, all take the mean, which is what is logged."""
    shared = {"loss_logged": 7.0, "last_logged_step": 3, "first_step": 0, "tokens": 9, "training": True}
    saved = [{"loss": x, "metrics": {"entropy": [x, 2.0]}, **shared} for x in (1.0, 4.0)]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=processes, process_index=index),
        model=torch.nn.Linear(1, 1).eval(),
        _tr_loss=torch.tensor(0.0),
        _metrics={"train": {"old": [1.0]}},
    )
    load_loop_state(trainer, saved)
    assert trainer._tr_loss.item() == loss and trainer.model.training
    assert trainer._metrics["train"] == {"entropy": [4.0 if (processes, index) == (2, 1) else 1.0, 2.0]}
    assert (trainer._total_loss_scalar, trainer._globalstep_last_logged, trainer._total_train_tokens) == (7.0, 3, 9)


def test_balanced_batches_are_of_the_epoch_on_several_processes_too(tmp_path, tokenizer, small_model, monkeypatch):
    """Accelerate's own `set_epoch` ends at the wrapper that gives each process its batches, where some are skipped."""
    trainer = trainer_of(tmp_path, small_model, tokenizer, constraint="clip", balance_tokens=True)
    sampler = trainer._get_train_sampler()
    batches = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), num_processes=2, process_index=0)
    loader = skip_first_batches(DataLoaderShard(trainer.train_dataset, batch_sampler=batches), 1)
    seen = []

    def run_epoch(self, epoch, train_dataloader, **kwargs):
        train_dataloader.set_epoch(epoch)
        seen.append(sampler.epoch)

    monkeypatch.setattr(DPOTrainer, "_run_epoch", run_epoch)
    trainer.state.max_steps = 9
    trainer._run_epoch(epoch=3, train_dataloader=loader)
    assert seen == [3]


# The log


def test_the_log_is_appended_to_and_read_as_if_never_interrupted(tmp_path):
    file = tmp_path / "log.jsonl"
    control, args = None, None

    def run(start, *steps, after=()):
        log, state = RunLog(file), SimpleNamespace(is_world_process_zero=True, global_step=start, max_steps=9)
        log.on_train_begin(args, state, control)
        for step in steps:
            state.global_step = step
            log.on_log(args, state, control, {"loss": step + start / 10})
        for logs in after:
            log.on_log(args, state, control, logs)
        RunLog(file).on_log(args, SimpleNamespace(is_world_process_zero=False), control, {"loss": 0.0})

    run(0, 0, 1, 2, 3)
    with file.open("a") as lines:
        lines.write('{"step": 4, "lo')
    first = file.read_bytes()
    run(2, 3, 4, after=[{"eval_loss": 1.0}, {"train_runtime": 5.0}])
    second = file.read_bytes()
    assert second.startswith(first + b"\n" + b'{"resumed_from": 2}\n'), "what was there stays, a torn line is ended"
    ends = [{"step": 4, "eval_loss": 1.0}, {"step": 4, "train_runtime": 5.0}]
    resumed = [{"step": s, "loss": x} for s, x in ((0, 0.0), (1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2))]
    assert read_log(file) == resumed + ends
    run(4, after=[{"eval_loss": 1.0}, {"train_runtime": 6.0}])  # killed after training: its end is said again
    assert read_log(file) == [*resumed, ends[0], {"step": 4, "train_runtime": 6.0}]
    run(0, 1)  # begun anew
    assert file.read_bytes().startswith(second) and read_log(file) == [{"step": 1, "loss": 1.0}]
    with file.open("ab") as lines:
        lines.write(b'{"step": 2, "loss": 2.0}')  # whole but for its newline
    run(2, 3)
    assert [line["step"] for line in read_log(file)] == [1, 2, 3]


def test_an_evaluation_before_training_stays_in_the_log(tmp_path, tokenizer, small_model):
    log = RunLog(tmp_path / "log.jsonl")
    trainer = trainer_of(tmp_path / "run", small_model, tokenizer, constraint="clip", max_steps=1, callbacks=[log])
    trainer.evaluate(pairs_dataset(3))
    trainer.train()
    assert [line["step"] for line in read_log(log.file)] == [0, 1]
    assert "eval_loss" in read_log(log.file)[0] and "resumed_from" not in log.file.read_text()


# Killed in earnest


def kill_and_resume(*options) -> str:
    script = PROCESSES / "kill_and_resume.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow(25)
def test_killed_three_times_with_one_process():
    assert "3 of 3 equal" in kill_and_resume("--times", 3, "--seed", 7)


@pytest.mark.slow
def test_killed_once_with_two_processes():
    """Under DDP, with λ, accumulation and balanced batches, while a checkpoint is being written."""
    assert "1 of 1 equal" in kill_and_resume("--times", 1, "--processes", 2, "--seed", 7, "--variant", 3)


# Early stopping


def stopping_early(folder, model, tokenizer, *, patience, stop=None, **options):
    """The evaluation loss falls, and higher is taken for better: every evaluation after the first is a worse one."""
    return trainer_of(
        folder,
        model,
        tokenizer,
        constraint="clip",
        max_steps=8,
        save_steps=1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(patience)],
        stop=stop,
        **options,
    )


@pytest.mark.filterwarnings("ignore:Using EarlyStoppingCallback without load_best_model_at_end")
def test_a_run_that_stopped_early_trains_no_further(tmp_path, tokenizer, small_model, no_model_cards):
    first = stopping_early(tmp_path, small_model, tokenizer, patience=2)
    first.train()
    assert first.state.global_step == 3
    again = stopping_early(tmp_path, small_model, tokenizer, patience=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and list(whole_checkpoints(tmp_path)) == [1, 2, 3]
    assert same(dict(again.model.state_dict()), dict(first.model.state_dict()))
    patient = stopping_early(tmp_path, small_model, tokenizer, patience=4)
    patient.train(resume_from_checkpoint=True)
    assert patient.state.global_step == 5, "two of its four evaluations were made before"


@pytest.mark.filterwarnings("ignore:Using EarlyStoppingCallback without load_best_model_at_end")
def test_a_resumed_run_stops_as_early_as_the_uninterrupted_one(tmp_path, tokenizer, small_model, no_model_cards):
    alone = stopping_early(tmp_path / "alone", small_model, tokenizer, patience=3)
    alone.train()
    stopping_early(tmp_path / "resumed", small_model, tokenizer, patience=3, stop=2).train()
    resumed = stopping_early(tmp_path / "resumed", small_model, tokenizer, patience=3)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, alone)
    assert alone.state.global_step == 4
