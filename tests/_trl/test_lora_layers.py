"""LoRA layers that leave out casts under autocast: the same bits in fewer operations, and PEFT's own where a cast counts."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl.lora_layers import SparingLinear, spare_casts
from trl_cpo.engine import dpo_trainer
from trl_cpo.engine.forward import PackedPairForward

from helpers import identity
from helpers.comparisons import same
from helpers.families import tiny_model
from helpers.forward_checks import gradients
from helpers.pair_batches import HARD_SIZES, model_inputs, random_pairs
from helpers.tiny import make_lora, make_model, pairs_dataset

BLOCKS, LAYERS = 2, 7


class Counted(TorchDispatchMode):
    """Counts the operations that are run within the block, those of backward among them."""

    def __init__(self):
        super().__init__()
        self.ran = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran += 1
        return func(*args, **(kwargs or {}))


def adapted(name="llama", dtype=torch.bfloat16, **options) -> PeftModel:
    """Weights in half precision with adapters in float32 on every linear layer, as TRL loads them for `bf16=True`."""
    settings = dict(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(name).to(dtype), LoraConfig(**{**settings, **options}))
    model.enable_input_require_grads()  # as TRL does, so that the first layers' inputs have gradients too
    return model.train()


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def step(model, attention=None, around=autocast, backward=True) -> tuple[dict, int]:
    """Outputs and gradients of a batch, padded or packed, and the number of operations that ran."""
    inputs = model_inputs(random_pairs(HARD_SIZES))
    forward = PackedPairForward(model, attention=attention, required=True) if attention else model
    torch.manual_seed(0)
    with Counted() as counted, torch.autograd.set_multithreading_enabled(False):
        with around(), torch.set_grad_enabled(backward):
            outputs = forward(**inputs)
        found = gradients(model, outputs) if backward else {}
    return {"log_probs": outputs.log_probs.detach(), "entropy": outputs.entropy.detach(), **found}, counted.ran


def saved(model, *arguments, **options) -> int:
    """How many operations fewer run, with every bit the same."""
    spare_casts(model)
    spared, ran = step(model, *arguments, **options)
    for module in model.modules():
        if type(module) is SparingLinear:
            module.__class__ = Linear
    expected, ran_before = step(model, *arguments, **options)
    assert expected["log_probs"].any() and (len(expected) > 2) == options.get("backward", True)
    assert same(spared, expected)
    return ran_before - ran


@pytest.mark.parametrize("attention", [None, "segments"], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_layer_saves_two_casts_forward_and_two_backward(name, attention, dtype):
    model = adapted(name, dtype)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert saved(model, attention, lambda: autocast(dtype)) == 4 * LAYERS * BLOCKS


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_saves_them_too(reentrant):
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert saved(model, "segments") == 6 * LAYERS * BLOCKS


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["norm"]}, {"use_rslora": True}, {"lora_bias": True}, {"lora_alpha": 13}],
    ids=lambda options: next(iter(options)),
)
def test_what_comes_after_the_product_does_not_matter(options):
    assert saved(adapted(**options), "segments") == 4 * LAYERS * BLOCKS


def test_dropout_that_is_off():
    assert saved(adapted(lora_dropout=0.3).eval(), "segments") == 4 * LAYERS * BLOCKS


def test_references_below_an_adapter():
    model = adapted()
    with model.disable_adapter():
        assert saved(model, "segments", backward=False) == 0
    model.add_adapter("ref", make_lora())  # on two of the layers
    with torch.no_grad():
        model.set_adapter("ref")
        assert saved(model, "segments", backward=False) == 2 * 2 * BLOCKS
    model.set_adapter("default")
    assert saved(model, "segments") == 4 * LAYERS * BLOCKS


def with_two_adapters():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


def with_half_adapters(dtype):
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


REFUSED = {
    "dropout": lambda: adapted(lora_dropout=0.3),
    "DoRA": lambda: adapted(use_dora=True),
    # The two gradients are added in float32.
    "two adapters": with_two_adapters,
    # A bfloat16 input loses bits in float16.
    "adapters of another half precision": lambda: with_half_adapters(torch.float16),
    "embeddings": lambda: adapted(target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_a_cast_counts_it_is_done(case):
    assert saved(REFUSED[case]()) == 0


def test_without_autocast_nothing_is_left_out():
    """There a layer fails on an input of another type than its weights."""
    assert saved(adapted(), around=lambda: autocast(enabled=False)) == 0
    assert saved(adapted(dtype=torch.float32), around=nullcontext) == 0


def test_a_layer_whose_product_is_not_torchs_own_gets_its_cast():
    class Other(torch.nn.Linear):
        pass

    model = adapted()
    for module in model.modules():
        if type(module) is Linear:
            module.lora_A["default"].__class__ = Other
    assert saved(model) == 0


@pytest.mark.parametrize(
    "x, spared",
    [
        (torch.ones(4, 8, dtype=torch.bfloat16), True),
        (torch.ones(4, 8), True),  # nothing to cast
        (torch.ones(4, 8, dtype=torch.float16), False),
        (torch.ones(4, 16, dtype=torch.bfloat16)[:, :8], False),
        (torch.ones(5, 8, dtype=torch.bfloat16)[1:], False),
    ],
    ids=["half precision", "float32", "another type", "apart in memory", "inside another tensor"],
)
def test_inputs(x, spared):
    model = adapted()
    spare_casts(model)
    layer = next(module for module in model.modules() if type(module) is SparingLinear)
    with autocast():
        assert (layer._cast_input_dtype(x, torch.float32) is x) == spared
    assert layer._cast_input_dtype(x, torch.float32).dtype is torch.float32


def test_a_layer_is_copied_merged_and_left_behind_as_peft_does(tmp_path):
    model = adapted()
    expected, _ = step(model)
    spare_casts(model)
    assert same(step(copy.deepcopy(model))[0], expected)
    file = io.BytesIO()
    torch.save(next(module for module in model.modules() if type(module) is SparingLinear), file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is SparingLinear
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # else PEFT looks for a config, and warns
    loaded = PeftModel.from_pretrained(tiny_model("llama").bfloat16(), tmp_path, is_trainable=True).train()
    loaded.enable_input_require_grads()
    assert same(step(loaded)[0], expected)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, Linear) for module in merged.modules())


def trained(tmp_path, tokenizer, **options):
    """A few steps and an evaluation in mixed precision, over adapters on weights in half precision."""
    options = {"bf16": True, "constraint": "clip", "gamma": 0.3, **options}

    def build():
        return dict(
            model=make_model().bfloat16(),
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            eval_dataset=pairs_dataset(6, seed=5),
            peft_config=make_lora(target_modules="all-linear"),
        )

    return identity.run(CPOConstrainedTrainer, CPOConstrainedConfig, tmp_path, build, options, {})


@pytest.mark.filterwarnings("ignore:constraint=:UserWarning")
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_a_training_keeps_every_bit(tmp_path, tokenizer, options, monkeypatch):
    ours = trained(tmp_path / "with", tokenizer, **options)
    assert any(type(module) is SparingLinear for module in ours.trainer.model.modules())
    monkeypatch.setattr(dpo_trainer, "spare_casts", lambda model: None)
    theirs = trained(tmp_path / "without", tokenizer, **options)
    assert not any(type(module) is SparingLinear for module in theirs.trainer.model.modules())
    identity.assert_same_run(theirs, ours)


def test_training_that_pads_has_pefts_layers(tmp_path, tokenizer):
    run = trained(tmp_path, tokenizer, prefix_sharing=False, max_steps=1)
    assert not any(type(module) is SparingLinear for module in run.trainer.model.modules())
