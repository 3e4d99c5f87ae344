"""The packed forward inside the trainer: when it is used, and that it trains as the padded one does."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.engine.forward import NotPackable, PackedPairForward, backends

from helpers.tiny import make_lora, make_mamba, make_model, make_moe, pairs_dataset, training_options

pytestmark = pytest.mark.filterwarnings("ignore:constraint=:UserWarning")


@pytest.fixture
def make(tmp_path, tokenizer, model_folder):
    def build(trainer_class=CPOConstrainedTrainer, config_class=CPOConstrainedConfig, options=None, **arguments):
        number = len(list(tmp_path.iterdir()))
        (tmp_path / str(number)).mkdir()
        args = config_class(**training_options(tmp_path / str(number), learning_rate=1e-3, **(options or {})))
        defaults = dict(
            model=model_folder,
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            eval_dataset=pairs_dataset(6, seed=5),
            args=args,
        )
        return trainer_class(**{**defaults, **arguments})

    return build


def in_use(trainer) -> bool:
    return isinstance(trainer._sharing.of(trainer.model), PackedPairForward)


def test_on_by_default_under_a_constraint_and_off_for_plain_dpo(make):
    assert in_use(make(options={"constraint": "clip"}))
    assert in_use(make(options={"constraint": "none", "prefix_sharing": True}))
    assert not in_use(make(options={"constraint": "none"}))
    assert not in_use(make(options={"constraint": "clip", "prefix_sharing": False}))


def numbers(trainer):
    trainer.train()
    evaluated = trainer.evaluate()
    logs = [{k: v for k, v in r.items() if "runtime" not in k and "per_second" not in k} for r in trainer.state.log_history]
    return logs, evaluated, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_close(ours, theirs):
    for a, b in zip(ours[0], theirs[0], strict=True):
        for key in b:
            if isinstance(b[key], float):
                # One token whose two best logits are nearly equal may change sides; accuracies count such tokens.
                slack = 0.02 if "accurac" in key else 2e-3
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=slack), key
    for name, weight in theirs[2].items():
        assert torch.allclose(ours[2][name], weight, atol=2e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"precompute_ref_log_probs": True},
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"loss_type": ["sigmoid", "bco_pair", "sft", "sigmoid_norm"]},
        {"f_divergence_type": "js_divergence"},
        {"max_length": 16},
        {"optim": "sgd"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "default",
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_trains_as_dpotrainer_does(make, options, lora):
    """Every logged number and the weights, against TRL's own padded training."""
    extra = {"peft_config": make_lora()} if lora else {}
    theirs = numbers(make(DPOTrainer, DPOConfig, options, **extra))
    ours = make(options={**options, "constraint": "none", "prefix_sharing": True}, **extra)
    assert in_use(ours)
    assert_close(numbers(ours), theirs)


def test_a_reference_that_follows_the_policy(make):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    theirs = numbers(make(DPOTrainer, DPOConfig, options))
    assert_close(numbers(make(options={**options, "constraint": "none", "prefix_sharing": True})), theirs)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_constraint_trains_as_it_does_padded(make, name):
    runs = []
    for sharing in (False, True):
        options = {"constraint": name, "gamma": 0.3, "logps_reduction": "mean", "prefix_sharing": sharing}
        runs.append(numbers(make(options=options)))
    assert_close(*runs)


def test_mixture_of_experts(make):
    runs = []
    for sharing in (False, True):
        options = {"constraint": "clip", "prefix_sharing": sharing}
        trainer = make(options=options, model=make_moe(0), ref_model=make_moe(1))
        assert in_use(trainer) == sharing
        runs.append(numbers(trainer))
    assert runs[0][0][0]["aux_loss"] > 0
    assert_close(*runs)


def test_models_that_cannot_be_packed_are_padded_with_one_line(make, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_cpo"):
        trainer = make(options={"constraint": "clip"}, model=make_mamba(0), ref_model=make_mamba(1))
        assert not in_use(trainer)
        trainer.train()
    lines = [record.message for record in caplog.records if "prefix sharing off" in record.message]
    assert len(lines) == 2 and all("MambaForCausalLM" in line for line in lines)  # policy and reference


def test_models_that_cannot_be_packed_are_refused_where_it_is_demanded(make):
    with pytest.raises(NotPackable, match="prefix_sharing=True does not work with MambaForCausalLM"):
        make(options={"constraint": "clip", "prefix_sharing": True}, model=make_mamba(0), ref_model=make_mamba(1))


def test_the_probe_leaves_random_numbers_and_order_alone(make):
    """The examples come in the same order, and the weights start the same, with and without the probe."""
    seen = []
    for sharing in (False, True):
        trainer = make(options={"constraint": "clip", "prefix_sharing": sharing}, peft_config=make_lora())
        trainer.train()
        batch = next(iter(trainer.get_train_dataloader()))
        seen.append((batch["input_ids"], torch.rand(3)))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])


def test_compute_metrics_gets_its_outputs_from_the_padded_model(make):
    trainer = make(
        options={"constraint": "clip", "prefix_sharing": True},
        compute_metrics=lambda prediction: {"size": int(prediction.predictions.shape[-1])},
    )
    assert trainer.evaluate()["eval_size"] == 400


def test_a_saved_model_knows_nothing_of_it(make, tmp_path):
    trainer = make(options={"constraint": "clip"})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert "trl_cpo" not in (tmp_path / "saved" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)
        trainer.model.generate(ids, max_new_tokens=3, do_sample=False)


def test_attention_that_is_changed_later_is_judged_anew(make, caplog):
    trainer = make(options={"constraint": "clip"})
    verdicts = {}
    for name in ("sdpa", "eager", "flex_attention"):
        trainer.model.set_attn_implementation(name)
        verdicts[name] = trainer._sharing.verdict(trainer.model)
    assert [v.attention for v in verdicts.values()] == ["segments", "dense", None]
    assert "flex_attention" in verdicts["flex_attention"].reason and not in_use(trainer)
    assert caplog.text.count("prefix sharing off") == 1
    trainer.model.set_attn_implementation("eager")
    trainer.train()
    trainer.model.set_attn_implementation("sdpa")
    assert trainer._sharing.of(trainer.model).attention == "segments"


def test_eager_attention_is_packed_too(make):
    model, reference = (make_model(seed, attn_implementation="eager") for seed in (0, 1))
    trainer = make(options={"constraint": "clip", "prefix_sharing": True}, model=model, ref_model=reference)
    trainer.train()
    assert trainer._sharing.verdict(trainer.model).attention == "dense"


@pytest.mark.parametrize("wanted", [None, True])
def test_a_run_that_is_compiled_runs_padded_and_says_so(make, caplog, wanted):
    options = {"constraint": "clip", "torch_compile": True, "torch_compile_backend": "eager"}
    trainer = make(options={**options, "prefix_sharing": wanted})
    assert not in_use(trainer)
    assert caplog.text.count("torch_compile=True: pairs run padded, without prefix sharing") == 1
    caplog.clear()
    make(options={**options, "prefix_sharing": False})
    assert "pairs run padded" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_trains_over_variable_length_attention_as_dpotrainer_does(make, options, lora, flash_kernels, monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice(("varlen",)))
    extra = {"peft_config": make_lora()} if lora else {}
    theirs = numbers(make(DPOTrainer, DPOConfig, options, **extra))
    ours = make(options={**options, "constraint": "none", "prefix_sharing": True}, **extra)
    assert ours._sharing.of(ours.model).attention == "varlen"
    assert_close(numbers(ours), theirs)


def test_mixed_precision_is_probed_as_it_is_trained(make, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make(options={"constraint": "clip", "bf16": True})
    verdict = trainer._sharing.verdict(trainer.model)
    assert verdict.ok and next(trainer.model.parameters()).dtype == torch.float32
    assert "segments attention: sdpa, bfloat16" in caplog.text
    trainer.train()
