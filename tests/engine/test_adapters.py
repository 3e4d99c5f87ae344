"""LoRA and QLoRA adapters after training: saved, loaded again, merged, trained further; the weights below never change."""

import peft
import pytest
import torch
from packaging.version import Version
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine import DPOConfig, DPOTrainer
from trl_cpo.engine.model_state import keep_trainable

from helpers.tiny import make_model, pairs_dataset, training_options


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> str:
    # Rows of at least 64 inputs, the size of a block of nf4.
    folder = tmp_path_factory.mktemp("wide")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return str(folder)


def base_weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" not in name}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("quantization", [None, nf4], ids=["lora", "qlora"])
def test_an_adapter_from_training_to_merging(tmp_path, tokenizer, wide_model, quantization):
    def load():
        options = {"quantization_config": quantization()} if quantization else {}
        model = AutoModelForCausalLM.from_pretrained(wide_model, **options)
        # Some CPUs would compute 4-bit layers in bfloat16 in evaluation, and nothing below could be told from rounding.
        keep_trainable(model)
        return model

    def train(folder, model, **more):
        options = training_options(tmp_path / folder, learning_rate=2e-2, max_steps=2)
        trainer = CPOConstrainedTrainer(
            model=model,
            args=CPOConstrainedConfig(**options, constraint="clip", gamma=1.0),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            **more,
        )
        before = base_weights(trainer.model)
        trainer.train()
        after = base_weights(trainer.model)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        trainer.save_model(str(tmp_path / folder))
        return trainer

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    more = {"quantization_config": quantization()} if quantization else {}
    trained = train("first", wide_model, peft_config=adapter, **more)
    start = logits(load())
    expected = logits(trained.model)
    assert (expected - start).abs().max() > 1e-2

    # Loaded again it is what was trained, to the last bit for LoRA. QLoRA's adapters are bfloat16 in training and float32
    # when loaded: the numbers are the same, the products are rounded less.
    again = PeftModel.from_pretrained(load(), tmp_path / "first")
    bound = 2e-2 if quantization else 0.0
    assert (logits(again) - expected).abs().max() <= bound

    # Merged into the weights that it was trained on: one rounding of each weight more.
    base = load().dequantize() if quantization else load()
    merged = PeftModel.from_pretrained(base, tmp_path / "first").merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(again), rtol=0, atol=1e-4)
    if quantization:
        # What not to do: into the original weights, and into 4 bits again, it is another model.
        original = AutoModelForCausalLM.from_pretrained(wide_model)
        elsewhere = PeftModel.from_pretrained(original, tmp_path / "first").merge_and_unload()
        assert (logits(elsewhere) - logits(again)).abs().max() > 1e-2
        with pytest.warns(UserWarning, match="rounding errors"):
            requantized = PeftModel.from_pretrained(load(), tmp_path / "first").merge_and_unload()
        assert (logits(requantized) - logits(again)).abs().max() > 1e-2

    # Trained further: the reference is the adapter as it was loaded, and the policy starts there. TRL makes the trained
    # adapter of a quantised model bfloat16 and leaves its reference in float32.
    further = train("second", PeftModel.from_pretrained(load(), tmp_path / "first", is_trainable=True))
    first_step = next(record for record in further.state.log_history if "loss" in record)
    assert first_step["cpo/gap"] == pytest.approx(first_step["cpo/ref_gap"], abs=bound or 1e-4)
    assert (logits(further.model) - expected).abs().max() > 1e-2


# --- the reference is the model without its adapter -------------------------------------------------------------------


@pytest.fixture
def biased(tmp_path, tokenizer):
    """A trainer on a model whose attention has biases, and how to build it."""

    def build(peft_config=None, model=None, **options):
        given = {key: options.pop(key) for key in ("ref_model", "trainer") if key in options}
        trainer, config = given.pop("trainer", None) or (CPOConstrainedTrainer, CPOConstrainedConfig)
        return trainer(
            model=model or make_model(attention_bias=True),
            args=config(**training_options(tmp_path / "out", **options)),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            peft_config=peft_config,
            **given,
        )

    return build


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_outside_the_adapter_are_refused_by_name(biased, bias):
    """TRL's live reference is the model with its adapter off, and PEFT leaves trained biases on: it follows the policy."""
    for options in ({"constraint": "clip"}, {"trainer": (DPOTrainer, DPOConfig)}):
        with pytest.raises(ValueError, match="The reference would change in training: .*q_proj.*bias.*precompute.*ref_model"):
            biased(lora(bias=bias), **options)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
def test_a_reference_that_cannot_follow_is_allowed(biased):
    for given in (
        {"precompute_ref_log_probs": True},
        {"ref_model": make_model(attention_bias=True)},
        {"loss_type": ["sft"], "constraint": "none"},
    ):
        biased(lora(bias="all"), **given).train()


def test_parameters_unfrozen_by_hand_are_refused_before_and_after_construction(biased):
    model = get_peft_model(make_model(), lora())
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    if Version(peft.__version__) < Version("0.21"):  # freezes it where DPOTrainer adds the reference's adapter
        biased(model=model)
        assert not embedding.requires_grad
    else:
        with pytest.raises(ValueError, match="1 trained parameters lie outside the adapter .*embed_tokens"):
            biased(model=model)
    trainer = biased(lora(), make_model())
    trainer.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="embed_tokens"):
        trainer.train()


@pytest.mark.parametrize(
    "adapter",
    [
        lora(),
        lora(use_dora=True),
        lora(modules_to_save=["embed_tokens"]),
        lora(trainable_token_indices=[3, 4]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        LNTuningConfig(task_type="CAUSAL_LM"),
    ],
    ids=["lora", "dora", "modules_to_save", "tokens", "ia3", "prompt", "ln"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_switches_off_is_not_refused_and_its_reference_stays(biased, adapter):
    """The rule against the numbers: the reference's log-probabilities after training are those before, to the last bit."""
    trainer = biased(adapter, make_model(tie_word_embeddings=False), constraint="none", check_reference=False)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([{name: row[name] for name in names} for row in trainer.train_dataset.select(range(4))])
    trainer.model.eval()
    before = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.train()
    trainer.model.eval()
    after = trainer.compute_ref_log_probs(trainer.model, batch)
    assert all(torch.equal(*sides) for sides in zip(before, after, strict=True))
    assert trained == [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
