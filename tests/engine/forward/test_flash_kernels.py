"""Models on a flash kernel: packed by the kernel's own variable-length function, their other calls as before."""

import logging

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward

from trl_cpo.engine.forward import PackedPairForward, packed_forward, probe, varlen
from trl_cpo.engine.forward.backends import choose, is_kernel

from helpers.families import tiny_model
from helpers.flash_emulation import KERNEL, flash_kernel
from helpers.forward_checks import assert_same_gradients, assert_same_outputs, gradients
from helpers.pair_batches import HARD_SIZES, model_inputs, random_pairs


@pytest.fixture(autouse=True)
def kernel():
    with flash_kernel():
        yield


def on_kernel(name, **changes):
    return tiny_model(name, attention=KERNEL, **changes)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "mixtral", "deepseek_v3"])
def test_they_are_packed_and_exact(name):
    # gemma2's softcapping, which no other packed attention does without a mask over the row, is the kernel's.
    model = on_kernel(name)
    inputs = model_inputs(random_pairs(HARD_SIZES))
    padded = model(**inputs)
    expected = gradients(model, padded)
    verdict = probe(model, max_length=48)
    assert verdict.ok and verdict.attention == "varlen" and verdict.error < 1e-4, verdict
    assert f"varlen attention: {KERNEL}, float32" in str(verdict)
    packed = PackedPairForward(model, attention="varlen", required=True)(**inputs)
    assert_same_outputs(padded, packed)
    assert_same_gradients(expected, gradients(model, packed), 1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_mixed_precision(reentrant):
    model = on_kernel("qwen3")
    inputs = model_inputs(random_pairs(HARD_SIZES))
    packed = PackedPairForward(model, attention="varlen", required=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, packed(**inputs))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        again = gradients(model, packed(**inputs))
    assert all(torch.equal(expected[name], gradient) for name, gradient in again.items())


def test_their_other_calls_are_the_kernels():
    model, other = on_kernel("mistral"), tiny_model("mistral")
    assert packed_forward(model, required=True)[1].ok
    assert model.config._attn_implementation == KERNEL
    inputs = model_inputs(random_pairs(HARD_SIZES))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).log_probs, other(**inputs).log_probs, atol=1e-4, rtol=0)
        prompt = {"input_ids": inputs["input_ids"][2:3, :20], "attention_mask": inputs["attention_mask"][2:3, :20]}
        options = dict(max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(**prompt, **options), other.generate(**prompt, **options))


def test_a_function_that_somebody_else_registered_since_is_replaced_again():
    model = on_kernel("llama")
    packed, _ = packed_forward(model, required=True)
    AttentionInterface.register(KERNEL, flash_attention_forward)  # as transformers does with each load of a kernel
    inputs = model_inputs(random_pairs(HARD_SIZES))
    assert_same_outputs(model(**inputs), packed.around(model)(**inputs))


def test_a_kernel_with_a_function_of_its_own_is_left_alone():
    AttentionInterface.register(KERNEL, lambda *args, **kwargs: flash_attention_forward(*args, **kwargs))
    assert not is_kernel(KERNEL)
    assert KERNEL in probe(on_kernel("llama")).reason


def test_the_choice():
    assert is_kernel("flash_attention_2") and is_kernel(KERNEL)
    assert not any(map(is_kernel, ("sdpa", "eager", "flex_attention", varlen.NAME)))
    for device, capability in (("cuda", (8, 0)), ("cpu", None)):
        assert choose(KERNEL, frozenset(), device, capability, torch.bfloat16).names == ("varlen",)


def test_chunks_are_refused():
    model = on_kernel("llama")
    model.config.layer_types = ["chunked_attention", "chunked_attention"]
    model.config.attention_chunk_size = 8
    assert "chunks" in probe(model, max_length=20).reason


@pytest.mark.parametrize("counted_once", [False, True])
def test_a_device_checks_the_kernel_once(counted_once, monkeypatch, caplog):
    monkeypatch.setattr(varlen, "CHECKED", ("cpu",))
    monkeypatch.setattr(varlen, "_KERNEL_FAULTS", {})
    if counted_once:
        monkeypatch.setattr(varlen.Gather, "backward", lambda ctx, g: (g.index_select(0, ctx.layout.first), None))
    with caplog.at_level(logging.INFO):
        verdict = probe(on_kernel("mistral"))
    assert verdict.ok == (not counted_once)
    assert caplog.text.count("held against plain attention") == (not counted_once)
    assert verdict.ok or "its attention on cpu is wrong: dk" in verdict.reason
