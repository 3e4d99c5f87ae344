"""Numbers that would train nothing, or not what was asked for, are refused before anything is made."""

import math

import pytest

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.cli import main
from trl_cpo.engine import DPOConfig

from helpers.tiny import make_model, pairs_dataset, training_options

IMPOSSIBLE = [
    ("gradient_accumulation_steps", -3),
    ("gradient_accumulation_steps", 0),
    ("num_train_epochs", 0),
    ("num_train_epochs", -2),
    ("num_train_epochs", math.nan),
    ("max_steps", 0),
    ("max_steps", -2),
    ("seed", -1),
    ("seed", 2**32),
    ("data_seed", -1),
    ("per_device_train_batch_size", 0),
    ("per_device_eval_batch_size", -1),
    ("learning_rate", -1e-6),
    ("learning_rate", math.inf),
    ("weight_decay", -0.1),
    ("max_grad_norm", -1.0),
    ("warmup_steps", -5),
    ("save_steps", 0),
    ("logging_steps", -1),
    ("eval_steps", 0),
    ("precompute_ref_batch_size", -1),
    ("max_length", 0),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE, ids=str)
def test_impossible_numbers_are_refused(tmp_path, name, value):
    options = training_options(tmp_path, max_steps=-1) | {name: value}
    for kind in (DPOConfig, CPOConstrainedConfig):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: {name} must be .*; got {value}"):
            kind(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_epochs", 0.5),
        ("max_steps", 1),
        ("seed", 2**32 - 1),
        ("data_seed", None),
        ("warmup_steps", 0.1),
        ("max_grad_norm", 0.0),
        ("learning_rate", 0.0),
        ("save_steps", 0.25),
        ("eval_steps", None),
        ("precompute_ref_batch_size", None),
        ("max_length", None),
    ],
    ids=str,
)
def test_their_limits_are_not(tmp_path, name, value):
    DPOConfig(**training_options(tmp_path) | {name: value})


def test_no_epochs_are_needed_where_steps_are_given(tmp_path):
    assert DPOConfig(**training_options(tmp_path, num_train_epochs=0, max_steps=2)).max_steps == 2


def test_all_faults_come_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)\(3 faults\).*gamma.*seed.*learning_rate"):
        CPOConstrainedConfig(**training_options(tmp_path, seed=-1, learning_rate=-1.0), gamma=1e308)


def test_the_command_line_says_so_and_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["train", "--config", "demo", "--max_steps", "0", "--output_dir", str(tmp_path / "out")])
    assert code == 2
    assert "max_steps must be" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_orders_by_length_are_refused_in_words_or_work(tmp_path, tokenizer, strategy):
    """transformers fails on them at the start of training: DPOTrainer removes the column with the lengths."""
    options = training_options(tmp_path, train_sampling_strategy=strategy)
    for kind in (DPOConfig, CPOConstrainedConfig):
        with pytest.raises(ValueError, match=rf"train_sampling_strategy='{strategy}' needs .*Set balance_tokens=True"):
            kind(**options)
    with_lengths = pairs_dataset().map(lambda row: {"length": len(row["chosen"])})
    trainer = CPOConstrainedTrainer(
        make_model(),
        make_model(1),
        args=CPOConstrainedConfig(**options, remove_unused_columns=False),
        processing_class=tokenizer,
        train_dataset=with_lengths,
    )
    trainer.train()
    assert trainer.state.global_step == options["max_steps"]
