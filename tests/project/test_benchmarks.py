"""The benchmark's command, on a tiny model: every case runs and its record and table hold what the docs explain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT


def run(tmp_path, model_folder, *options):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "--model", model_folder, "--pairs", "demo-answers", "--batches", "2"]
    command += ["--max_length", "256", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {record["case"]: record for record in json.loads(out.read_text())}, done.stdout


@pytest.mark.slow
def test_times(tmp_path, model_folder):
    names = ["constraint-cost", "packed-lora-8", "packed-full-8", "reference-pass-8", "release-4", "equal-4to1"]
    records, table = run(tmp_path, model_folder, "--no-memory", "--cases", *names)
    assert list(records) == names
    for name in names:
        assert records[name]["ratio"] > 0 and f"| {name} |" in table
    assert records["equal-4to1"]["limit"] == pytest.approx(10 / 6)
    assert records["packed-full-8"]["lowest"] <= records["packed-full-8"]["highest"]


@pytest.mark.slow(28)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process is read from Linux")
def test_memory(tmp_path, model_folder):
    records, table = run(tmp_path, model_folder, "--cases", "packed-full-8")
    record = records["packed-full-8"]
    # A batch of 8 pairs of some 120 tokens, on a model of 20 thousand parameters: activations are what there is.
    assert record["baseline_mib"] > 20 and 0 < record["memory_ratio"] < 1
    assert "MiB)" in table


def test_what_a_bound_costs_is_measured(model_folder):
    """KL is nothing before training and something after; the violations are those of the final weights."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.bound import kl_paid, measured, tokens_of, trained
    from trl_cpo.data.loading import load_pairs, to_conversational

    train, test = (to_conversational(load_pairs("demo-answers", split))[0].select(range(8)) for split in ("train", "test"))
    trainer = trained(model_folder, train, test, 1.0, 0, constraint="lagrangian", epsilon=5.0, target_modules="all-linear")
    side = trainer.processing_class.padding_side
    mask = tokens_of(trainer.processing_class, test["prompt"])["attention_mask"]
    assert not mask[:, 0].all() and mask[:, -1].all() and trainer.processing_class.padding_side == side
    record = measured(trainer, {"train": train, "test": test})
    gaps = trainer.evaluated_pairs["eval_train"].gap
    assert record["train_violation"] == pytest.approx((1.0 - gaps).clamp(min=0).mean().item(), rel=1e-6)
    assert all("lambda" in point for point in record["curve"]) and len(record["curve"]) == 2 and record["kl"] > 0
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    assert kl_paid(trainer, test["prompt"]) == pytest.approx(0, abs=1e-6)


def test_growth_is_told_apart_from_the_first_step(model_folder):
    sys.path.insert(0, str(ROOT))
    from benchmarks.__main__ import row
    from benchmarks.cases import cases, growth

    _, setting, target = cases(model_folder, "demo-answers", 2, 128)["growth"]
    record = growth(setting, False, sizes=(16, 40))
    times = record["seconds_per_pair"]
    assert list(times) == [16, 40] and all(v["train_s"] > 0 and v["first_step_s"] > 0 for v in times.values())
    fastest, slowest = sorted(v["train_s"] for v in times.values())
    assert record["largest_over_smallest"] == slowest / fastest
    assert "16: " in row("growth", record, target) and "s for the first step" in row("growth", record, target)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("arm", ["dpo", "packed"])
def test_a_case_with_checkpointing_runs_its_layers_once_more(model_folder, arm, lora):
    """A step takes the policy through a layer once, and with LoRA the reference too; the backward once more."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.arms import Setting, batches_of, step_of, trainer_of

    def forwards(checkpointing):
        setting = Setting(model_folder, lora=lora, batch=2, max_length=128, batches=1, checkpointing=checkpointing)
        trainer, count = trainer_of(setting, arm), [0]
        step, (batch,) = step_of(trainer, setting), batches_of(trainer, setting)
        layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.1.mlp"))
        # Before it, for what is run once more is left as soon as the backward has what it needs.
        layer.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        step(batch)
        return count[0]

    assert (forwards(False), forwards(True)) == ((2, 3) if lora else (1, 2))


def test_the_cases_that_need_it_have_checkpointing(model_folder):
    """The one that says so: the figures of the others were measured without."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.cases import cases

    settings = {name: setting for name, (_, setting, _) in cases(model_folder, "demo-answers", 2).items()}
    named = {name for name in settings if name.endswith("-checkpointing")}
    assert {name for name, setting in settings.items() if setting.checkpointing} == named


def test_an_unknown_case_is_named(tmp_path, model_folder):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--model", model_folder, "--cases", "packd"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "no case packd; the cases are constraint-cost" in done.stderr
