"""With the constraint off, CPOConstrainedTrainer is the installed DPOTrainer: losses, gradients, metrics and weights `==`."""

from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl.loss import LOSS_READS

from helpers.tiny import make_model, pairs_dataset, training_options

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
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
TIMINGS = ("_runtime", "_per_second")


class GradientRecorder(TrainerCallback):
    """Keeps a copy of every gradient before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append(grads)


def run(trainer_class, config_class, output_dir, build, options, config_extra):
    torch.manual_seed(0)
    args = config_class(**training_options(output_dir, **options), **config_extra)
    recorder = GradientRecorder()
    trainer = trainer_class(args=args, callbacks=[recorder], **build())
    trainer.train()
    evaluated = trainer.evaluate() if trainer.eval_dataset is not None else {}
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return SimpleNamespace(
        logs=trainer.state.log_history, gradients=recorder.steps, weights=weights, evaluated=evaluated, trainer=trainer
    )


def comparable(record: dict) -> dict:
    return {k: v for k, v in record.items() if "cpo/" not in k and not k.endswith(TIMINGS)}


def assert_same_run(theirs, ours):
    assert len(theirs.logs) == len(ours.logs) > 0
    for a, b in zip(theirs.logs, ours.logs, strict=True):
        assert comparable(a) == comparable(b)
    assert comparable(theirs.evaluated) == comparable(ours.evaluated)
    assert len(theirs.gradients) == len(ours.gradients) > 0
    for a, b in zip(theirs.gradients, ours.gradients, strict=True):
        assert a.keys() == b.keys() and a
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert theirs.weights.keys() == ours.weights.keys()
    assert all(torch.equal(theirs.weights[name], ours.weights[name]) for name in theirs.weights)
    # The run must have moved something, or equality would say little.
    assert any(torch.count_nonzero(g) for g in theirs.gradients[-1].values())


def check(tmp_path, build, options=None, ours_only=None, theirs_only=None):
    options = options or {}
    theirs = run(DPOTrainer, DPOConfig, tmp_path / "theirs", build, options, theirs_only or {})
    ours = run(
        CPOConstrainedTrainer,
        CPOConstrainedConfig,
        tmp_path / "ours",
        build,
        options,
        {"constraint": "none", **(ours_only or {})},
    )
    assert_same_run(theirs, ours)
    return theirs, ours


@pytest.fixture
def plain(model_folder, tokenizer):
    """Full fine-tuning from a folder; the reference is TRL's own."""

    def build(**extra):
        return dict(
            model=model_folder,
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            eval_dataset=pairs_dataset(6, seed=5),
            **extra,
        )

    return build


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
    check(tmp_path, lambda: plain(peft_config=LORA), options)


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
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LORA).save_pretrained(adapter)

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


def moe(seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        initializer_range=0.2,
        router_aux_loss_coef=0.1,
        output_router_logits=True,
    )
    return Qwen3MoeForCausalLM(config)


def test_mixture_of_experts_with_its_auxiliary_loss(tmp_path, tokenizer):
    def build():
        return dict(
            model=moe(0),
            ref_model=moe(1),
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
