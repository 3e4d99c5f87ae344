"""Packing under what training puts around a model: LoRA, checkpointing, compilation, an optimiser, a saved folder."""

import json
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trl_cpo.engine.forward import PackedPairForward, packed_forward
from trl_cpo.engine.forward.backends import BACK_ENDS

from helpers.families import tiny_config, tiny_model
from helpers.forward_checks import ATTENTIONS, assert_same_gradients, assert_same_outputs, gradients
from helpers.pair_batches import HARD_SIZES, model_inputs, random_pairs

#: Back ends that a model is switched to, and the name of each one's attention.
OURS = {name: back_end.implementation for name, back_end in BACK_ENDS.items() if back_end.implementation}


def lora_model(**options):
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    )
    return model.eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("off", [False, True])
def test_lora_and_its_reference_with_the_adapter_off(attention, off):
    torch.manual_seed(0)
    model = lora_model()
    inputs = model_inputs(random_pairs(HARD_SIZES))
    packed = PackedPairForward(model, attention=attention, required=True)
    with model.disable_adapter() if off else nullcontext(), torch.set_grad_enabled(not off):
        padded, other = model(**inputs), packed(**inputs)
        assert_same_outputs(padded, other)
        if not off:
            expected = gradients(model, padded)
            assert expected and all("lora" in name for name in expected)
            assert_same_gradients(expected, gradients(model, packed(**inputs)))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "opt", "mixtral"])
def test_gradient_checkpointing(name, attention, reentrant):
    changes = dict(hidden_dropout=0.0, attention_dropout=0.0) if name == "gpt_neox" else {}
    changes = dict(dropout=0.0) if name == "opt" else changes
    model = tiny_model(name, **changes)
    inputs = model_inputs(random_pairs(HARD_SIZES))
    expected = gradients(model, model(**inputs))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    packed = PackedPairForward(model, attention=attention, required=True)(**inputs)
    assert_same_gradients(expected, gradients(model, packed), 1e-3)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_training_trajectory_is_the_padded_one(attention):
    batches = [model_inputs(random_pairs(HARD_SIZES, seed)) for seed in range(6)]

    def train(wrap):
        model = tiny_model("llama", scale=0.15).train()
        call, losses = wrap(model), []
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for inputs in batches:
            chosen, rejected = call(**inputs).log_probs.sum(1).chunk(2)
            loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return torch.tensor(losses), torch.cat([p.detach().flatten() for p in model.parameters()])

    losses, weights = train(lambda model: model)
    packed_losses, packed_weights = train(lambda m: PackedPairForward(m, attention=attention, required=True))
    assert losses[-1] != losses[0]
    torch.testing.assert_close(packed_losses, losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_weights, weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", OURS)
def test_a_model_left_on_ours_computes_and_generates_as_on_sdpa(attention):
    model, other = tiny_model("mistral"), tiny_model("mistral")
    PackedPairForward(model, attention=attention)
    assert model.config._attn_implementation == OURS[attention]
    inputs = model_inputs(random_pairs(HARD_SIZES))
    with torch.no_grad():
        assert torch.equal(model(**inputs).log_probs, other(**inputs).log_probs)
        prompt = {"input_ids": inputs["input_ids"][2:3, :20], "attention_mask": inputs["attention_mask"][2:3, :20]}
        options = dict(max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(**prompt, **options), other.generate(**prompt, **options))


@pytest.mark.parametrize("attention", OURS)
def test_a_saved_model_does_not_name_our_attention(attention, tmp_path):
    model = tiny_model("llama")
    PackedPairForward(model, attention=attention)
    model.save_pretrained(tmp_path)
    assert OURS[attention] not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", OURS)
def test_autocast_rounds_as_the_padded_path_does(attention, name):
    model = tiny_model(name, scale=0.2)
    inputs = model_inputs(random_pairs(HARD_SIZES))
    packed = PackedPairForward(model, attention=attention, required=True)
    where = inputs["labels"][:, 1:] != -100
    with torch.no_grad():
        truth = model(**inputs).log_probs
        with torch.autocast("cpu", dtype=torch.bfloat16):
            padded, other = (call(**inputs).log_probs - truth for call in (model, packed))
    assert float(other[where].abs().max()) <= 2 * float(padded[where].abs().max())


def test_wrappers_are_seen_through():
    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    inner = lora_model()
    inputs = model_inputs(random_pairs(HARD_SIZES))
    packed, verdict = packed_forward(Engine(inner), required=True)
    assert verdict.ok
    assert_same_outputs(inner(**inputs), packed(**inputs))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every tensor it traces
def test_a_compiled_model():
    model = tiny_model("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    batches = [model_inputs(random_pairs(HARD_SIZES[n:], seed=n)) for n in range(2)]
    expected = [gradients(model, model(**inputs)) for inputs in batches]
    packed = PackedPairForward(compiled, required=True)
    for inputs, gradient in zip(batches, expected, strict=True):
        assert_same_gradients(gradient, gradients(model, packed(**inputs)))


def test_a_compiled_model_is_left_on_masks():
    _, verdict = packed_forward(torch.compile(tiny_model("llama"), backend="eager"), required=True)
    assert verdict.attention == "dense"


def test_around_the_reference_with_the_same_settings():
    policy, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    packed = PackedPairForward(policy, attention="segments", row_length=50, max_length=64, required=True)
    other = packed.around(reference)
    inputs = model_inputs(random_pairs(HARD_SIZES))
    assert (other.attention, other.row_length, other.max_length, other.required) == ("segments", 50, 64, True)
    with torch.no_grad():
        assert_same_outputs(reference(**inputs), other(**inputs))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft"])
def test_trls_own_loss_takes_it_in_place_of_the_model(attention, loss_type, tmp_path):
    """DPOTrainer's `_compute_loss`, given the packed forward for policy and reference, computes what it computes."""
    trainer = dpo_trainer(tmp_path, loss_type)
    inputs = next(iter(trainer.get_train_dataloader()))
    plain = trainer._compute_loss(trainer.model, inputs, False)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    model, reference = trainer.model, trainer.ref_model
    trainer.ref_model = PackedPairForward(reference, attention=attention, required=True)
    packed = trainer._compute_loss(PackedPairForward(model, attention=attention, required=True), inputs, False)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)
    logged.pop("num_tokens")  # counts on
    for name, value in logged.items():
        assert trainer._metrics["train"][name][-1] == pytest.approx(value, abs=1e-4), name


def dpo_trainer(folder, loss_type):
    """A DPOTrainer over a tiny policy, another tiny model as reference, and four made-up pairs."""
    words = {word: n for n, word in enumerate(["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(200))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")

    def text(tokens):
        return " ".join(f"w{token - 3}" for token in tokens if token < 203)

    rows = [
        dict(prompt=text(p) + " ", chosen=text(c), rejected=text(r))
        for p, c, r in random_pairs([(9, 5, 8), (3, 12, 2), (14, 3, 3), (6, 6, 7)])
    ]
    torch.manual_seed(0)
    policy, reference = (LlamaForCausalLM(tiny_config("llama", initializer_range=0.3)) for _ in range(2))
    config = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        loss_type=[loss_type],
        max_length=20,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        optim="adamw_torch",
    )
    return DPOTrainer(
        model=policy, ref_model=reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=fast
    )
