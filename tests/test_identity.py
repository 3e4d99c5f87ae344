"""With the constraint off, CPOConstrainedTrainer is the installed DPOTrainer: losses, gradients, metrics and weights `==`."""

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl.loss import LOSS_READS

from helpers.identity import check
from helpers.tiny import make_lora, make_model, make_moe, pairs_dataset, training_options

LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type(tmp_path, plain, ref_model_folder, loss_type):
    def build():
        return plain(ref_model=AutoModelForCausalLM.from_pretrained(ref_model_folder))

    check(tmp_path, build, {"loss_type": [loss_type], "label_smoothing": 0.1 if loss_type == "exo_pair" else 0.0})


def test_the_list_of_losses_is_trls():

    message = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = [name for name in LOSS_READS if f"'{name}'" in message]
    assert sorted(named) == sorted(LOSS_READS) == sorted(LOSSES)


def test_mix_of_losses_with_label_smoothing(tmp_path, plain, ref_model_folder):
    def build():
        return plain(ref_model=AutoModelForCausalLM.from_pretrained(ref_model_folder))

    options = {"loss_type": ["sigmoid", "bco_pair", "sft", "sigmoid_norm"], "loss_weights": [0.8, 0.2, 1.0, 0.5]}
    check(tmp_path, build, options)


def test_mean_log_probabilities_are_sigmoid_norm(tmp_path, plain, ref_model_folder):
    def build():
        return plain(ref_model=AutoModelForCausalLM.from_pretrained(ref_model_folder))

    _, ours = check(tmp_path, build, ours_only={"logps_reduction": "mean"}, theirs_only={"loss_type": ["sigmoid_norm"]})
    assert ours.trainer.args.loss_type == ["sigmoid_norm"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"precompute_ref_log_probs": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"ld_alpha": 0.3, "precompute_ref_log_probs": True, "loss_type": ["sigmoid_norm"]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"bf16": True},
        {"max_length": 16, "truncation_mode": "keep_start"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_full_fine_tuning(tmp_path, plain, options):
    check(tmp_path, plain, options)


def test_conversational_pairs_and_several_evaluation_sets(tmp_path, model_folder, tokenizer):
    def build():
        return dict(
            model=model_folder,
            processing_class=tokenizer,
            train_dataset=pairs_dataset(conversational=True),
            eval_dataset={
                "near": pairs_dataset(5, seed=1, conversational=True),
                "far": pairs_dataset(7, seed=2, conversational=True),
            },
        )

    _, ours = check(tmp_path, build, {"eval_strategy": "steps", "eval_steps": 2})
    assert {"eval_near_cpo/gap", "eval_far_cpo/gap"} <= ours.evaluated.keys()


def test_streaming_dataset(tmp_path, model_folder, tokenizer):
    def build():
        dataset = IterableDataset.from_generator(lambda: iter(pairs_dataset().to_list()))
        return dict(model=model_folder, processing_class=tokenizer, train_dataset=dataset)

    check(tmp_path, build)


@pytest.mark.parametrize(
    "options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}, {"use_weighting": True}], ids=str
)
def test_lora(tmp_path, plain, options):
    check(tmp_path, lambda: plain(peft_config=make_lora()), options)


def test_full_fine_tuning_with_live_dropout(tmp_path, tokenizer):
    def build():
        return dict(
            model=make_model(attention_dropout=0.3),
            ref_model=make_model(1, attention_dropout=0.3),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
        )

    check(tmp_path, build, {"disable_dropout": False})


def test_lora_with_live_dropout_draws_the_same_random_numbers(tmp_path, tokenizer):
    """The base model's dropout is on in the reference's forward too, so the order of the forwards shows."""

    def build():
        config = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj"], init_lora_weights=False)
        return dict(
            model=make_model(attention_dropout=0.3),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            peft_config=config,
        )

    check(tmp_path, build, {"disable_dropout": False})


def test_an_adapter_trained_further(tmp_path, tokenizer, model_folder):
    adapter = tmp_path / "adapter"
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), make_lora()).save_pretrained(adapter)

    def build():
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        return dict(
            model=PeftModel.from_pretrained(base, adapter, is_trainable=True),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            eval_dataset=pairs_dataset(6, seed=5),
        )

    theirs, ours = check(tmp_path, build)
    assert "ref" in ours.trainer.model.peft_config
    # The reference is the loaded adapter, not the bare base model: the first loss is ln 2.
    assert ours.logs[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_mixture_of_experts_with_its_auxiliary_loss(tmp_path, tokenizer):
    def build():
        return dict(
            model=make_moe(0),
            ref_model=make_moe(1),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            eval_dataset=pairs_dataset(6, seed=5),
        )

    _, ours = check(tmp_path, build)
    assert ours.logs[0]["aux_loss"] > 0


def test_compute_metrics_gets_its_outputs(tmp_path, plain):
    """`return_outputs=True`, deprecated in TRL, pays its extra forward after the loss and not inside it."""

    def build():
        return plain(compute_metrics=lambda prediction: {"size": int(prediction.predictions.shape[-1])})

    _, ours = check(tmp_path, build)
    assert ours.evaluated["eval_size"] == 400


def test_the_signature_is_dpotrainers():
    import inspect

    theirs = list(inspect.signature(DPOTrainer.__init__).parameters.values())
    ours = list(inspect.signature(CPOConstrainedTrainer.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("precomputed", [False, True])
def test_no_extra_forward_pass(tmp_path, plain, precomputed, sharing):
    """Policy once a step; reference once a step, or never where it was precomputed; packed or padded."""
    calls = {"policy": 0, "reference": 0}
    options = training_options(tmp_path, precompute_ref_log_probs=precomputed)
    args = CPOConstrainedConfig(**options, constraint="softplus", gamma=1.0, prefix_sharing=sharing)
    trainer = CPOConstrainedTrainer(args=args, **plain())
    if trainer.ref_model is not None:
        trainer._sharing.of(trainer.ref_model)  # probed now, not in the steps that are counted
        trainer.ref_model.register_forward_hook(lambda *_: calls.__setitem__("reference", calls["reference"] + 1))
    trainer.model.register_forward_hook(lambda *_: calls.__setitem__("policy", calls["policy"] + 1))
    trainer.train()
    assert calls == {"policy": 3, "reference": 0 if precomputed else 3}
