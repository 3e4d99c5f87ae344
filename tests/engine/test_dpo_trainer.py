"""The engine by itself: plain DPO, bit for bit, with exact resume and packing, and no constraint anywhere."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer as TRLTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine import DPOConfig, DPOTrainer

from helpers.checkpoint_runs import StopAt, assert_same_end
from helpers.comparisons import without_timings
from helpers.identity import assert_same_run, run
from helpers.tiny import make_lora, make_moe, pairs_dataset, training_options


def check(tmp_path, build, options):
    theirs = run(TRLTrainer, TRLConfig, tmp_path / "theirs", build, options, {})
    ours = run(DPOTrainer, DPOConfig, tmp_path / "ours", build, options, {})
    assert_same_run(theirs, ours)
    assert not [name for log in ours.logs for name in log if name.startswith("cpo/")]
    return theirs, ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"precompute_ref_log_probs": True},
        {"use_weighting": True, "ld_alpha": 0.5},
    ],
    ids=["default", "accumulation", "losses", "precomputed", "weighted"],
)
def test_it_is_the_installed_dpo_trainer(tmp_path, plain, options):
    check(tmp_path, plain, options)


def test_with_lora(tmp_path, plain):
    check(tmp_path, lambda: plain(peft_config=make_lora()), {})


def test_with_a_mixture_of_experts(tmp_path, plain):
    check(tmp_path, lambda: plain() | dict(model=make_moe(), ref_model=make_moe()), {})


def trainer_of(folder, model, tokenizer, *, stop=None, kind=(DPOTrainer, DPOConfig), **options):
    trainer_class, config_class = kind
    defaults = dict(
        max_steps=4,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=3,
        lr_scheduler_type="cosine",
    )
    torch.manual_seed(0)
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=config_class(**training_options(folder, **{**defaults, **options})),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(6),
        callbacks=[StopAt(stop)] if stop else [],
    )


@pytest.mark.parametrize("options", [{}, {"prefix_sharing": True, "balance_tokens": True}], ids=["padded", "packed"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, tokenizer, small_model, no_model_cards, options):
    alone = trainer_of(tmp_path / "alone", small_model, tokenizer, **options)
    alone.train()
    trainer_of(tmp_path / "resumed", small_model, tokenizer, stop=2, **options).train()
    resumed = trainer_of(tmp_path / "resumed", small_model, tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, alone)


def test_packed_it_logs_the_same_to_rounding(tmp_path, tokenizer, small_model):
    padded, packed = (
        trainer_of(tmp_path / str(sharing), small_model, tokenizer, prefix_sharing=sharing, save_strategy="no", logging_steps=1)
        for sharing in (False, True)
    )
    for trainer in (padded, packed):
        trainer.train()
    assert packed._sharing.verdict(packed.model).ok
    for a, b in zip(padded.state.log_history, packed.state.log_history, strict=True):
        a, b = without_timings(a), without_timings(b)
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-3) for name in a)


def test_its_checkpoint_is_one_for_the_constraint_and_the_other_way_round(tmp_path, tokenizer, small_model, no_model_cards):
    """What only the other trainer counts is named in a warning, and the run goes on."""
    ours = (CPOConstrainedTrainer, CPOConstrainedConfig)
    trainer_of(tmp_path / "a", small_model, tokenizer, stop=2).train()
    trainer_of(tmp_path / "a", small_model, tokenizer, kind=ours).train(resume_from_checkpoint=True)
    trainer_of(tmp_path / "b", small_model, tokenizer, stop=2, kind=ours).train()
    with pytest.warns(UserWarning, match="its metrics state is not used"):
        trainer_of(tmp_path / "b", small_model, tokenizer).train(resume_from_checkpoint=True)


def test_a_config_of_trl_is_refused_in_words(tmp_path, tokenizer, small_model):
    with pytest.raises(TypeError, match="from trl_cpo.engine import DPOConfig"):
        trainer_of(tmp_path, small_model, tokenizer, kind=(DPOTrainer, TRLConfig))


def test_a_loss_that_is_no_number_is_stopped(tmp_path, tokenizer, small_model):
    trainer = trainer_of(tmp_path, small_model, tokenizer, save_strategy="no")
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        trainer.train()


def test_every_pair_of_an_evaluation_is_kept(tmp_path, tokenizer, small_model):
    trainer = trainer_of(tmp_path, small_model, tokenizer, save_strategy="no")
    trainer.evaluate(pairs_dataset(5, seed=3))
    pairs = trainer.evaluated_pairs["eval"]
    assert len(pairs.gap) == 5 and torch.equal(pairs.gap, pairs.ref_gap)
    assert trainer.evaluated_degenerate["eval"].tolist() == [False] * 5


def test_the_default_config_is_named_after_the_model(tokenizer, small_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert DPOTrainer._config(None, "owner/model").output_dir == "model-DPO"
    assert CPOConstrainedTrainer._config(None, "owner/model").output_dir == "model-CPO"


def test_its_public_names_are_looked_up_when_they_are_used():
    import trl_cpo.engine

    assert trl_cpo.engine.DPOTrainer is DPOTrainer and trl_cpo.engine.DPOConfig is DPOConfig
    with pytest.raises(AttributeError, match="nothing_here"):
        trl_cpo.engine.nothing_here  # noqa: B018
