"""A run that does not start at its reference is stopped before its first step, with the reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine import start_check
from trl_cpo.engine.start_check import StartCheck, exemption
from trl_cpo.pairs import PairLogps

from helpers.paths import PROCESSES
from helpers.tiny import make_model, pairs_dataset, training_options

LORA = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def seen(monkeypatch):
    """Every measurement that the check of the start makes, as the largest number of tolerances apart."""
    values = []
    measure = StartCheck.deviation

    def spy(*args):
        apart = measure(*args)
        values.append(apart.max().item())
        return apart

    monkeypatch.setattr(StartCheck, "deviation", spy)
    return values


@pytest.fixture
def make(tmp_path, tokenizer, model_folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def build(options=None, model=None, **arguments):
        args = CPOConstrainedConfig(**training_options(tmp_path / "out", **{"max_steps": 1, **(options or {})}))
        defaults = dict(processing_class=tokenizer, train_dataset=pairs_dataset(8))
        return CPOConstrainedTrainer(model=model or model_folder, args=args, **{**defaults, **arguments})

    return build


def loaded(folder, **overrides):
    return AutoModelForCausalLM.from_pretrained(folder, **overrides)


def trained_adapter(folder):
    model = get_peft_model(loaded(folder), LoraConfig(**LORA, init_lora_weights=False))
    return model


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def assert_stopped_before_the_first_step(trainer, *words):
    before = weights_of(trainer)
    with pytest.raises(ValueError, match="does not start at its reference") as error:
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    for word in (*words, "check_reference=False"):
        assert word in str(error.value)


STARTS = {
    "full": lambda make, folder: make(),
    "full, packed": lambda make, folder: make({"constraint": "clip", "prefix_sharing": True}),
    "means": lambda make, folder: make({"constraint": "clip", "logps_reduction": "mean"}),
    "synchronised": lambda make, folder: make({"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "lora": lambda make, folder: make(peft_config=LoraConfig(**LORA)),
    "lora, half of it gaussian": lambda make, folder: make(peft_config=LoraConfig(**LORA, init_lora_weights="gaussian")),
    "an adapter trained further": lambda make, folder: make(model=trained_adapter(folder)),
    "precomputed in other batches": lambda make, folder: make(
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    ),
    "precomputed padded, trained packed": lambda make, folder: make(
        {"precompute_ref_log_probs": True, "constraint": "clip", "prefix_sharing": True}
    ),
    "bfloat16 autocast": lambda make, folder: make({"bf16": True, "constraint": "clip"}),
    "bfloat16 weights": lambda make, folder: make({"model_init_kwargs": {"dtype": "bfloat16"}}),
    "weighted tails": lambda make, folder: make({"ld_alpha": 0.3}),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_at_the_reference_passes(make, seen, model_folder, name):
    """In one look, and far from the tolerance."""
    trainer = STARTS[name](make, model_folder)
    trainer.train()
    assert trainer.state.global_step == 1
    assert len(seen) == 1 and seen[0] < 0.5


def test_it_looks_once_in_a_training(make, seen):
    trainer = make({"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2})
    trainer.train()
    trainer.train()  # goes on from trained weights, which are no longer the reference
    assert len(seen) == 1


def test_a_model_changed_in_memory(make, model_folder):
    """TRL loads the reference from the folder named in the config, whatever the object holds."""
    model = loaded(model_folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.02)
    assert_stopped_before_the_first_step(make(model=model), "save the model", repr(model_folder))


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}])
def test_weights_changed_after_the_trainer_was_made(make, options):
    trainer = make(options)
    with torch.no_grad():
        trainer.model.model.layers[1].self_attn.q_proj.weight.mul_(1.02)
    cause = "are stale, or come from another model" if options else "the model object differs from"
    assert_stopped_before_the_first_step(trainer, cause, "create the trainer last")


def test_an_adapter_that_changes_the_model_under_it(make):
    trainer = make(peft_config=LoraConfig(**LORA, init_lora_weights="pissa"))
    assert_stopped_before_the_first_step(trainer, "init_lora_weights='pissa' changes the base model")


def test_a_reference_adapter_that_is_not_the_start(make, model_folder):
    trainer = make(model=trained_adapter(model_folder))
    assert isinstance(trainer.model, PeftModel)
    with torch.no_grad():
        trainer.model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.ref.weight").add_(0.02)
    assert_stopped_before_the_first_step(trainer, "the adapter 'ref'")


def test_precomputed_values_of_another_pair(make):
    """A table whose rows were shifted by one is caught, whatever made it."""
    trainer = make({"precompute_ref_log_probs": True})
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        values = trainer.train_dataset[column][:]
        shifted = trainer.train_dataset.remove_columns(column).add_column(column, [*values[1:], values[0]])
        trainer.train_dataset = shifted
    assert_stopped_before_the_first_step(trainer, "are stale, or come from another model, tokenizer or chat template")


def test_it_can_be_switched_off(make, model_folder, seen):
    model = loaded(model_folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.02)
    trainer = make({"check_reference": False}, model=model)
    trainer.train()
    assert trainer.state.global_step == 1 and not seen


EXCUSED = {
    "an explicit reference": lambda make: make(ref_model=make_model(1)),
    "an adapter that is said to start elsewhere": lambda make: make(peft_config=LoraConfig(**LORA, init_lora_weights=False)),
    "no reference in the loss": lambda make: make({"loss_type": ["sft"]}),
}


@pytest.mark.parametrize("name", EXCUSED)
def test_what_need_not_start_at_its_reference(make, seen, name):
    trainer = EXCUSED[name](make)
    trainer.train()
    assert trainer.state.global_step == 1 and not seen


def test_a_resumed_run_is_not_at_its_reference(make, seen):
    make({"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "save_only_model": False}).train()
    assert len(seen) == 1
    trainer = make({"max_steps": 3, "save_strategy": "no"})
    with pytest.warns(UserWarning, match="max_steps was 2 and is 3"):
        trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert trainer.state.global_step == 3 and len(seen) == 1


@pytest.mark.parametrize("noise", ["dropout", "noise on the embeddings"])
def test_honest_noise_is_looked_past_without_a_random_number_drawn(make, seen, tmp_path, tokenizer, noise):
    """Policy and reference differ in training and agree at rest; the training is the one without the check, bit for bit."""
    model = make_model(attention_dropout=0.3 if noise == "dropout" else 0.0)
    model.save_pretrained(tmp_path / "noisy")
    options = {"disable_dropout": False} if noise == "dropout" else {"neftune_noise_alpha": 5.0}
    logs = []
    for check in (True, False):
        torch.manual_seed(1)
        trainer = make({"max_steps": 2, "check_reference": check, **options}, model=str(tmp_path / "noisy"))
        trainer.train()
        logs.append(
            [
                {k: v for k, v in log.items() if "per_second" not in k and "runtime" not in k}
                for log in trainer.state.log_history
            ]
        )
    assert logs[0] == logs[1]
    assert len(seen) == 2 and seen[0] > 1 > seen[1]


def test_noise_does_not_excuse_another_reference(make, tmp_path):
    make_model(attention_dropout=0.3).save_pretrained(tmp_path / "noisy")
    model = loaded(tmp_path / "noisy")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.02)
    trainer = make({"disable_dropout": False}, model=model)
    assert_stopped_before_the_first_step(trainer, "the model object differs from")
    assert trainer.model.training and trainer.model.model.layers[0].self_attn.training


def test_excuses():
    must = dict(wanted=True, reference_given=False, reads_reference=True, adapter=None)
    assert exemption(**must) is None
    assert exemption(**must | {"adapter": LoraConfig()}) is None
    for change in (
        {"wanted": False},
        {"reference_given": True},
        {"reads_reference": False},
        {"adapter": LoraConfig(init_lora_weights=False)},
    ):
        assert exemption(**must | change)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 4000), excess=st.floats(0.01, 50), side=st.integers(0, 1), mean=st.booleans())
def test_the_distance_is_in_tolerances_and_the_same_for_sums_and_means(n, excess, side, mean):
    """A difference of `excess · c √n` nats in the sum is `excess` tolerances, in whichever answer it stands."""
    check = StartCheck(None, half_precision=False)
    difference = excess * start_check.FULL_PRECISION_TOLERANCE * n**0.5
    moved = torch.zeros(2, dtype=torch.float64)
    moved[side] = difference / n if mean else difference
    zero = torch.zeros(1, dtype=torch.float64)
    pairs = PairLogps(moved[:1], moved[1:], zero, zero)
    mask = torch.ones(2, n, dtype=torch.long)
    apart = check.deviation(pairs, mask, "mean" if mean else "sum")
    assert apart.shape == (1,) and abs(apart.item() - excess) <= 1e-6 * excess


def test_a_coarser_precision_has_a_coarser_tolerance_that_still_sees_another_model():
    """Another model of the same size is several nats per token away: hundreds of tolerances at 30 tokens."""
    assert start_check.FULL_PRECISION_TOLERANCE < start_check.HALF_PRECISION_TOLERANCE < 1


class Recorder(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise AssertionError("a step was made")


def test_two_processes_stop_together_though_one_alone_sees_it(tmp_path, model_folder, tokenizer):
    """Two trainings in one launch: a start that is wrong on process 1 alone, and a NaN on process 0 alone."""
    script = PROCESSES / "stop_together.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--standalone",
        str(script),
        json.dumps({"model": model_folder, "folder": str(tmp_path)}),
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_DATASETS_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"stopped{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == second["processes"] == 2
    for run in ("start", "nan", "gradient"):
        assert first[run]["steps"] == second[run]["steps"], run
        assert first[run]["error"].split(":")[0] == second[run]["error"].split(":")[0] != "", run
    assert first["start"]["error"] == second["start"]["error"]
    assert first["start"]["error"].startswith("ValueError: The policy does not start at its reference: 2 of the 4 pairs")
    assert first["start"]["steps"] == 0
    for run in (first, second):
        assert run["nan"]["error"].startswith("FloatingPointError: Step 1:") and "process 0" in run["nan"]["error"]
        assert "process 1" not in run["nan"]["error"]
        assert run["gradient"]["error"].startswith("FloatingPointError: After step 1 trained weights are NaN")
    # The text is known to the process whose pair it is.
    assert first["nan"]["text"] in first["nan"]["error"] and first["nan"]["text"] not in second["nan"]["error"]
