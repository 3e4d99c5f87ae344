"""`trl-cpo plan`: counts against real models, optimizers and adapters, and what must hold of any estimate."""

import dataclasses
import json
import os
import subprocess
import sys

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    SmolLM3Config,
)

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.cli import main
from trl_cpo.cli.recipe_files import read_config
from trl_cpo.plan import PlanRequest, cheapest, estimate, quicker
from trl_cpo.plan.activations import kept_by
from trl_cpo.plan.changes import LADDER, SAFE
from trl_cpo.plan.known import known_config, known_models
from trl_cpo.plan.memory import HEAD_COPIES, adapters, optimizer, weights
from trl_cpo.plan.shape import NF4_BYTES, default_targets, shape_of
from trl_cpo.plan.size import parse_size, shown
from trl_cpo.plan.text import as_text
from trl_cpo.recipes import names
from trl_cpo.run.arguments import PolicyConfig

from helpers.paths import ROOT
from helpers.tiny import make_model, pairs_dataset, training_options

SIZES = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
)
TINY = LlamaConfig(**SIZES)
FAMILIES = [
    TINY,
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    Qwen2Config(**SIZES),
    GemmaConfig(**SIZES, head_dim=16),
    MixtralConfig(**SIZES, num_local_experts=2),
    GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=256),
]
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: f"{c.model_type}{'-tied' * bool(c.tie_word_embeddings)}")
def test_weights_are_those_of_the_real_model(config):
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    assert shape.weights == sum(p.numel() for p in model.parameters())
    assert shape.layers == 3
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert shape.head == model.get_output_embeddings().weight.numel()


def test_an_8b_model_is_counted_without_its_weights():
    assert shape_of(LLAMA_8B).weights == 8_030_261_248


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]], ids=str)
@pytest.mark.parametrize("config", [TINY, Qwen2Config(**SIZES)], ids=lambda c: c.model_type)
def test_lora_is_pefts(config, targets):
    lora = LoraConfig(r=4, target_modules=targets[0] if len(targets) == 1 else targets, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    assert shape_of(config).lora_weights(4, targets) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    "name, weights",
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
    ],
)
def test_configs_that_ship_are_those_of_the_published_models(name, weights):
    """The numbers of weights are those that the models' pages state."""
    assert shape_of(known_config(name)).weights == weights


def test_a_config_ships_for_the_model_of_each_recipe_and_the_default():
    models = {read_config(name)["model_name_or_path"] for name in names()} | {PolicyConfig.model_name_or_path}
    assert models - {"demo"} == set(known_models())
    assert known_config("somebody/something") is None


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("config", [TINY, Qwen2Config(**SIZES), FAMILIES[-1]], ids=lambda c: c.model_type)
def test_lora_without_targets_has_pefts_own(config):
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, task_type="CAUSAL_LM"))
    targets = default_targets(config.model_type)
    assert shape_of(config).lora_weights(4, targets) == model.get_nb_trainable_parameters()[0]
    assert shape_of(config).lora_weights(4, targets) < shape_of(config).lora_weights(4, "all-linear")


def test_where_peft_has_no_default_targets_they_are_asked_for():
    with pytest.raises(ValueError, match="PEFT has no default layers for LoRA on a smollm3 model"):
        default_targets("smollm3")
    model = AutoModelForCausalLM.from_config(SmolLM3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("pattern", [r".*\.(q_proj|o_proj)", ".*down_proj", "q_proj"])
def test_one_target_is_a_pattern_as_in_peft(pattern):
    lora = LoraConfig(r=4, target_modules=pattern, task_type="CAUSAL_LM")
    if pattern == "q_proj":
        with pytest.raises(ValueError, match="not found"):
            get_peft_model(AutoModelForCausalLM.from_config(TINY), lora)
        with pytest.raises(ValueError, match=r"Give '\.\*q_proj' or several of .*, v_proj"):
            shape_of(TINY).lora_weights(4, pattern)
        return
    model = get_peft_model(AutoModelForCausalLM.from_config(TINY), lora)
    assert shape_of(TINY).lora_weights(4, pattern) == model.get_nb_trainable_parameters()[0]


def test_a_target_that_no_layer_has_is_refused():
    with pytest.raises(ValueError, match="no linear layer is named c_attn; choose from .*q_proj"):
        shape_of(TINY).lora_weights(4, ["c_attn"])


def test_four_bit_weights_are_bitsandbytes(tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    real = 0
    for parameter in model.parameters():
        real += parameter.numel() * parameter.element_size()
        if hasattr(parameter, "quant_state"):
            real += parameter.quant_state.absmax.numel() * 4
    request = PlanRequest(config=model.config, bits=4, lora_rank=4)
    assert weights(request, shape_of(model.config)) == pytest.approx(real, rel=1e-3)
    assert NF4_BYTES == 0.5625


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_as_many_bytes_as_trl_has_it_train(tmp_path, tokenizer, bits):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    quantization = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    trainer = CPOConstrainedTrainer(
        model=str(tmp_path / "model"),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(4),
        args=CPOConstrainedConfig(**training_options(tmp_path, constraint="clip")),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
        quantization_config=quantization,
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    config = trainer.model.config
    request = PlanRequest(config=config, bits=bits, lora_rank=4, lora_targets=default_targets(config.model_type))
    assert adapters(request, shape_of(config)) == sum(p.numel() * p.element_size() for p in trained)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_fsdp2_shards_four_bits_that_are_stored_as_floats(storage):
    """Accelerate leaves a frozen 4-bit weight out of the sharding unless it is_floating_point()."""
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", quant_storage=getattr(torch, storage)).to("cpu")
    request = PlanRequest(config=LLAMA_8B, gpus=8, parallel="fsdp2", bits=4, lora_rank=16, quant_storage=storage)
    shape = shape_of(LLAMA_8B)
    assert request.shards_quantized == layer.weight.is_floating_point()
    whole = NF4_BYTES * shape.quantizable
    others = request.held_bytes * (shape.weights - shape.quantizable)
    assert weights(request, shape) == pytest.approx(whole / (8 if storage != "uint8" else 1) + others / 8)


def test_a_70b_model_in_four_bits_is_whole_on_every_device_of_fsdp2():
    big = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    request = PlanRequest(
        config=big, gpus=8, parallel="fsdp2", bits=4, weight_bytes=2, lora_rank=16, micro_batch=1, max_length=512
    )
    assert weights(request, shape_of(big)) > 38e9
    changes, after = cheapest(request, 30e9)
    assert [change.option for change in changes] == ["--bnb_4bit_quant_storage bfloat16"]
    assert after.resident["weights"] < 6e9


@pytest.mark.slow
def test_zeros_state_is_deepspeeds(tmp_path):
    """Stage by stage, with and without mixed precision, all weights and adapters: what DeepSpeed holds after a step."""
    program = ROOT / "tests" / "processes" / "zero_state.py"
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == 6
    for case in cases:
        request = PlanRequest(
            config=TINY,
            parallel=f"zero{case['stage']}",
            autocast=case["bf16"],
            lora_rank=case["rank"],
            lora_targets=default_targets("llama"),
        )
        shape = shape_of(TINY)
        held = weights(request, shape) + adapters(request, shape) + optimizer(request, shape)
        # DeepSpeed pads each partition to a multiple of its alignment.
        assert held == pytest.approx(case["held"], rel=0.002), case


def test_offloading_takes_as_much_of_the_machines_memory_as_deepspeed_says():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    request = PlanRequest(config=LLAMA_8B, gpus=8, parallel="zero3", offload=True, precomputed=True, micro_batch=1)
    found, shape = estimate(request), shape_of(LLAMA_8B)
    theirs, *_ = estimate_zero3_model_states_mem_needs(shape.weights, shape.block, 8, additional_buffer_factor=1)
    assert found.machine_memory == pytest.approx(theirs)
    assert estimate(dataclasses.replace(request, precomputed=False)).machine_memory == found.machine_memory + 2 * shape.weights
    assert estimate(dataclasses.replace(request, offload=False)).machine_memory == 0
    frozen = estimate(dataclasses.replace(request, lora_rank=16)).machine_memory
    assert frozen == pytest.approx(2 * shape.weights + 18 * shape.lora_weights(16, "all-linear"))


@pytest.mark.parametrize("optim, kind", [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizer_state_is_the_real_ones(optim, kind):
    model = AutoModelForCausalLM.from_config(TINY)
    real = kind(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    real.step()
    held = sum(
        v.numel() * v.element_size() for state in real.state.values() for v in state.values() if v is not None and v.dim()
    )
    assert optimizer(PlanRequest(config=TINY, optim=optim), shape_of(TINY)) == held


def kept_in(forward, model) -> float:
    """Bytes that a forward keeps for backward, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # noqa: F841  its graph holds what is kept
    return float(sum(size for size, _ in kept.values()))


NO_DROPOUT = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)  # as DPOTrainer trains


@pytest.mark.parametrize("rows, tokens", [(1, 48), (3, 200)])
@pytest.mark.parametrize(
    "config",
    [TINY, Qwen2Config(**SIZES), GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=256, **NO_DROPOUT)],
    ids=lambda c: c.model_type,
)
def test_activations_are_what_a_real_forward_keeps(config, rows, tokens):
    """Counted on one and two blocks and three lengths without numbers; here three blocks, another length, and numbers."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train()
    ids, mask = torch.randint(0, 256, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.long)
    mask[0, -3:] = 0
    real = kept_in(lambda: model.base_model(input_ids=ids, attention_mask=mask, use_cache=False), model)
    block, around = kept_by(config, dtype=torch.float32, autocast=False)
    assert 3 * block.padded(rows, tokens) + around.padded(rows, tokens) == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("lora", [(), "all-linear", ("q_proj", "v_proj")], ids=["full", "lora", "lora-qv"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
def test_activations_are_what_the_trainer_keeps(tmp_path, tokenizer, packed, lora, mixed):
    prompt, answer, batch = 60, 40, 3
    wide = dict(hidden_size=64, intermediate_size=192)
    model = make_model(**wide).to(torch.bfloat16 if mixed else torch.float32)
    adapters = LoraConfig(r=8, target_modules=lora, task_type="CAUSAL_LM") if lora else None
    trainer = CPOConstrainedTrainer(
        model=model,
        ref_model=None if lora else make_model(**wide),
        processing_class=tokenizer,
        train_dataset=pairs_dataset(4),
        args=CPOConstrainedConfig(
            **training_options(tmp_path, constraint="clip", prefix_sharing=packed, max_length=100, bf16=mixed)
        ),
        peft_config=adapters,
    )
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(10, 300, (count,), generator=generator).tolist()

    inputs = trainer.data_collator(
        # One answer is shorter, or DPOTrainer's rows would need no mask.
        [{"prompt_ids": ids(prompt), "chosen_ids": ids(answer), "rejected_ids": ids(answer - (i == 0))} for i in range(batch)]
    )
    trainer.model.train()
    with trainer.accelerator.autocast():
        real = kept_in(lambda: trainer.compute_loss(trainer.model, inputs), trainer.model)
    request = PlanRequest(
        config=model.config,
        device="cpu",
        weight_bytes=2 if mixed else 4,
        autocast=mixed,
        lora_rank=8 if lora else 0,
        lora_targets=lora,
        checkpointing=False,
        packed=packed,
        micro_batch=batch,
        max_length=prompt + answer,
        prompt_share=prompt / (prompt + answer),
    )
    assert estimate(request).forward["activations"] == pytest.approx(real, rel=0.06)


def test_a_mixture_of_experts_is_refused_in_words():
    with pytest.raises(ValueError, match="mixtral model .* depends on the values"):
        estimate(PlanRequest(config=MixtralConfig(**SIZES, num_local_experts=2)))


BASE = PlanRequest(config=TINY, gpus=2, parallel="ddp", packed=False, checkpointing=False, max_length=128, micro_batch=4)


def peak(**changes):
    return estimate(dataclasses.replace(BASE, **changes)).peak


@pytest.mark.parametrize("autocast, each", [(True, 16.0), (False, 20.0)], ids=["bf16", "float32"])
def test_zero_holds_a_weight_its_gradient_and_its_state(autocast, each):
    """Mixed precision: 2 and 2 bytes, and 12 in float32 (copy and two moments). Float32: 4, 4 and 12."""
    held = estimate(PlanRequest(config=LLAMA_8B, gpus=8, parallel="zero3", autocast=autocast, precomputed=True, max_length=64))
    state = held.resident["weights"] + held.resident["optimizer"] + held.backward["gradients"]
    assert 8 * state / held.shape.weights == pytest.approx(each)


class TestWhatMustHold:
    @settings(deadline=None, max_examples=25)
    @given(st.sampled_from([64, 128, 512]), st.sampled_from([1, 2, 8]), st.booleans(), st.booleans(), st.booleans())
    def test_longer_and_more_never_need_less(self, length, batch, packed, checkpointing, lora):
        options = dict(packed=packed, checkpointing=checkpointing, lora_rank=4 if lora else 0)
        here = peak(max_length=length, micro_batch=batch, **options)
        assert here <= peak(max_length=2 * length, micro_batch=batch, **options)
        assert here <= peak(max_length=length, micro_batch=batch + 1, **options)

    @pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3", "fsdp2"])
    def test_more_gpus_never_need_more(self, kind):
        needs = [peak(parallel=kind, gpus=n, micro_batch=1, max_length=32) for n in (1, 2, 4, 64)]
        assert needs[1:] == sorted(needs[1:], reverse=True)

    def test_each_stage_of_zero_holds_no_more_than_the_one_before(self):
        big = dict(config=LLAMA_8B, gpus=8, micro_batch=1, max_length=256, checkpointing=True)
        stages = [peak(parallel=kind, **big) for kind in ("zero1", "zero2", "zero3")]
        assert stages == sorted(stages, reverse=True)

    @pytest.mark.parametrize("change", LADDER, ids=lambda c: c.option)
    def test_no_change_of_the_ladder_makes_it_worse(self, change):
        big = PlanRequest(
            config=LLAMA_8B, gpus=8, parallel="ddp", packed=False, checkpointing=False, micro_batch=4, optim="adamw_torch"
        )
        for request in (big, dataclasses.replace(big, lora_rank=16), dataclasses.replace(big, parallel="zero3")):
            made = change.made(request)
            if made is not None:
                assert estimate(made).peak <= estimate(request).peak * 1.001

    def test_every_change_can_be_made_somewhere(self):
        starts = [
            dataclasses.replace(BASE, parallel=kind, lora_rank=rank, optim=optim)
            for kind in ("ddp", "zero3")
            for rank in (0, 4)
            for optim in ("adamw_torch", "adamw_torch_fused")
        ]
        starts.append(dataclasses.replace(BASE, parallel="fsdp2", lora_rank=4, bits=4))
        for change in LADDER:
            assert any(change.made(request) is not None for request in starts), change.option


class TestLadder:
    def test_what_fits_with_one_change_gets_the_first_that_does(self):
        request = PlanRequest(config=LLAMA_8B, lora_rank=16, weight_bytes=2, packed=False, micro_batch=4)
        needed = estimate(request).peak
        changes, after = cheapest(request, needed * 0.999)
        assert [change.option for change in changes] == ["--prefix_sharing True"] and after.peak < needed

    def test_full_fine_tuning_of_8b_on_one_24_gb_card_ends_in_qlora(self):
        changes, after = cheapest(PlanRequest(config=LLAMA_8B, micro_batch=1), 24e9)
        options = " ".join(change.option for change in changes)
        assert "--use_peft" in options and after.peak <= 24e9

    def test_none_is_superfluous(self):
        request = PlanRequest(config=LLAMA_8B, micro_batch=8, packed=False, checkpointing=False)
        changes, _ = cheapest(request, 24e9)
        for left_out in changes[:-1]:
            made = request
            for change in changes:
                if change is not left_out and made is not None:
                    made = change.made(made)
            assert made is None or estimate(made).peak > 24e9, left_out.option

    def test_where_nothing_fits_it_says_so(self):
        assert cheapest(PlanRequest(config=LLAMA_8B), 1e9) is None


class TestQuicker:
    REQUEST = PlanRequest(config=LLAMA_8B, weight_bytes=2, lora_rank=16, micro_batch=8, accumulation=4)

    @staticmethod
    def peak(request, **changes):
        return estimate(dataclasses.replace(request, **changes)).peak

    def ways(self, memory, **changes):
        return [
            (way.request.checkpointing, way.request.micro_batch, way.request.accumulation)
            for way in quicker(dataclasses.replace(self.REQUEST, **changes), memory)
        ]

    def test_without_checkpointing_in_as_few_micro_batches_as_fit(self):
        for times in (1, 2, 4):
            needed = self.peak(self.REQUEST, checkpointing=False, micro_batch=8 * times)
            assert self.ways(needed / SAFE)[0] == (False, 8 * times, 4 // times)
            assert (False, 8 * times, 4 // times) not in self.ways(0.99 * needed / SAFE)

    def test_with_it_where_that_makes_them_fewer(self):
        needed = self.peak(self.REQUEST, checkpointing=False)
        assert self.peak(self.REQUEST, micro_batch=32) < needed
        assert self.ways(needed / SAFE) == [(False, 8, 4), (True, 32, 1)]
        assert self.ways(self.peak(self.REQUEST, micro_batch=16) / SAFE) == [(True, 16, 2)]
        assert self.ways(0.99 * self.peak(self.REQUEST, micro_batch=16) / SAFE) == []
        assert self.ways(1e12) == [(False, 32, 1)]

    def test_micro_batches_are_never_made_smaller(self):
        """On an H200, four of 8 pairs without checkpointing took longer than one of 32 with it."""
        memory = self.peak(self.REQUEST, checkpointing=False, micro_batch=4)
        assert self.peak(self.REQUEST) < memory < self.peak(self.REQUEST, checkpointing=False)
        assert all(pairs >= 8 for _, pairs, _ in self.ways(memory / SAFE))

    @pytest.mark.parametrize("changes", [dict(device="cpu"), dict(packed=False)])
    def test_padded_pairs_and_a_cpus_stay_in_their_micro_batches(self, changes):
        assert self.ways(1e15, **changes) == [(False, 8, 4)]
        assert self.ways(1e15, checkpointing=False, **changes) == []

    def test_where_it_is_off_the_micro_batches_may_still_be_fewer(self):
        assert self.ways(1e15, checkpointing=False) == [(False, 32, 1)]
        assert self.ways(1e15, checkpointing=False, micro_batch=32, accumulation=1) == []

    def test_told_as_options(self):
        memory = self.peak(self.REQUEST, checkpointing=False) / SAFE
        told = as_text(estimate(self.REQUEST), memory, None, quicker(self.REQUEST, memory))
        assert (
            "The same steps in less time:\n  --gradient_checkpointing False\n      saves 1/4 of the arithmetic; needs " in told
        )
        assert (
            "\n  --per_device_train_batch_size 32 --gradient_accumulation_steps 1\n      the GPU waits less for the CPU;"
            in told
        )
        assert "in less time" not in as_text(estimate(self.REQUEST), memory, None, [])


def test_without_triton_the_head_holds_its_tiles_several_times():
    on_cpu, on_gpu = (estimate(dataclasses.replace(BASE, device=d, autocast=False, packed=True)) for d in ("cpu", "cuda"))
    assert on_cpu.forward["logits"] == HEAD_COPIES * on_gpu.forward["logits"]


@pytest.mark.parametrize(
    "text, size", [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("80g", 80e9), ("512 mb", 512e6), ("1.5TB", 1.5e12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "", "GB", "-1GB", "0GB", "24 apples", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="24GB, 80GiB or 512MB"):
        parse_size(text)


def test_sizes_are_shown_short():
    assert (shown(24.04e9), shown(512.3e6)) == ("24.0 GB", "512 MB")


class TestCommand:
    def plan(self, *arguments):
        return main(["plan", *map(str, arguments)])

    @pytest.fixture
    def folder(self, tmp_path):
        TINY.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_text(self, folder, capsys):
        assert self.plan("--model", folder, "--memory", "24GB", "--use_peft") == 0
        told = capsys.readouterr().out
        assert "It fits into 24.0 GB" in told and "LoRA r 16" in told and "together" in told

    def test_what_does_not_fit_is_1_and_names_a_change(self, folder, capsys):
        options = ["--model", folder, "--per_device_train_batch_size", 64, "--constraint", "none"]
        assert self.plan(*options, "--json") == 0
        short = json.loads(capsys.readouterr().out)["peak"] - 1e6
        assert self.plan(*options, "--memory", f"{short:.0f}B") == 1
        told = capsys.readouterr().out
        assert "does not fit" in told and "--prefix_sharing True" in told

    def test_json(self, folder, capsys):
        assert self.plan("--model", folder, "--gpus", 4, "--parallel", "zero3", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["request"]["gpus"] == 4 and document["fits"] is None
        assert sum(document["terms"].values()) == pytest.approx(document["peak"], abs=20)

    @pytest.mark.parametrize("name", [name for name in names() if not name.startswith("demo")])
    def test_a_recipe_needs_no_network(self, name, capsys, monkeypatch):
        monkeypatch.setattr("trl_cpo.data.models.read_config", lambda *_, **__: pytest.fail("looked for on the hub"))
        assert self.plan("--config", name) == 0
        assert "million weights" in capsys.readouterr().out

    def test_another_revision_or_a_folder_is_looked_for(self, capsys, tmp_path, monkeypatch):
        name = "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert self.plan("--model", name, "--model_revision", "other") == 2
        assert f"Cannot load the model {name}" in capsys.readouterr().err
        monkeypatch.chdir(tmp_path)
        TINY.save_pretrained(tmp_path / name)
        assert self.plan("--model", name, "--json") == 0
        assert json.loads(capsys.readouterr().out)["weights"] < 1e6

    def test_lora_without_targets_is_pefts(self, folder, capsys):
        found = {}
        for targets in ([], ["--lora_target_modules", "q_proj", "v_proj"], ["--lora_target_modules", "all-linear"]):
            assert self.plan("--model", folder, "--use_peft", *targets, "--json") == 0
            found[" ".join(targets)] = json.loads(capsys.readouterr().out)["terms"]["adapters"]
        default, named, every = found.values()
        assert default == named < every

    def test_offloading_says_what_the_machine_must_have(self, folder, capsys):
        options = ["--model", folder, "--gpus", 2, "--parallel", "zero3", "--offload"]
        assert self.plan(*options) == 0
        assert "Offloading takes 3 MB of the machine's memory for all its devices together" in capsys.readouterr().out

    def test_advice_to_offload_says_it_too(self):
        request = PlanRequest(config=LLAMA_8B, gpus=2, parallel="zero3", micro_batch=1, precomputed=True)
        remedy = cheapest(request, 30e9)
        assert "offload" in remedy[0][-1].option
        assert "Offloading takes 144.5 GB of the machine's memory" in as_text(estimate(request), 30e9, remedy)

    def test_a_recipe(self, folder, capsys):
        assert self.plan("--config", "hh-rlhf-qlora-24gb", "--model", folder, "--memory", "24GB", "--json") == 0
        assert json.loads(capsys.readouterr().out)["quicker"][0]["checkpointing"] is False
        assert self.plan("--config", "hh-rlhf-qlora-24gb", "--model", folder, "--memory", "24GB") == 0
        assert "base in 4 bits" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["--gpus", "0"], "--gpus must be 1 or more; got 0"),
            (["--memory", "24"], "with its unit"),
            (["--prompt_share", "1.5"], "between 0 and 1"),
            (["--offload"], "--offload needs --parallel zero3"),
            (["--load_in_4bit"], "cannot be trained: train an adapter on them, with --use_peft"),
            (["--model", "./nowhere"], "Cannot load the model ./nowhere"),
            (["--parallel", "zero4"], "zero3"),
            (["--bete", "0.1"], "--beta"),
            (["--use_peft", "--lora_target_modules", "a", "b"], "no linear layer is named a or b"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_mistakes(self, folder, capsys, arguments, said):
        model = [] if "--model" in arguments else ["--model", str(folder)]
        assert self.plan(*model, *arguments) == 2
        assert said in capsys.readouterr().err
