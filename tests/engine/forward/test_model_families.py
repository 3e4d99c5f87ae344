"""The verdict on each model family, and that it is the right one."""

import pytest
import torch
import transformers
from packaging.version import Version

from trl_cpo.engine.forward import packed_forward, probe
from trl_cpo.engine.forward.adapter import PackedPairForward
from trl_cpo.engine.forward.mask import FULL, LayerKind
from trl_cpo.engine.forward.probing.static_checks import PLAIN_FAMILIES, static_reason

from helpers.families import SETTINGS, tiny_model
from helpers.forward_checks import assert_same_gradients, assert_same_outputs, gradients
from helpers.pair_batches import HARD_SIZES, model_inputs, random_pairs

#: From 5.24 on, transformers hands these two families' attention to its common interface, which takes segments.
GPTJ = "segments" if Version(transformers.__version__) >= Version("5.24") else "dense"

# Family, and what the probe says of it: the attention it is exact with, or words of the reason it is refused for.
VERDICTS = {
    "llama": "segments",
    "qwen2": "segments",
    "qwen3": "segments",
    "mistral": "segments",
    "ministral": "segments",
    "gemma": "segments",
    "gemma2": "dense",
    "gemma3_text": "segments",
    "phi": "segments",
    "phi3": "segments",
    "gpt2": "segments",
    "gpt_neox": "segments",
    "opt": "segments",
    "mixtral": "segments",
    "qwen2_moe": "segments",
    "qwen3_moe": "segments",
    "olmoe": "segments",
    "granitemoe": "segments",
    "granite": "segments",
    "cohere": "segments",
    "cohere2": "segments",
    "glm4": "segments",
    "nemotron": "segments",
    "olmo": "segments",
    "olmo2": "segments",
    "olmo3": "segments",
    "stablelm": "segments",
    "starcoder2": "segments",
    "smollm3": "segments",
    "gpt_oss": "dense",
    "deepseek_v3": "segments",
    "gptj": GPTJ,
    "codegen": GPTJ,
    "gpt_bigcode": "segments",
    "falcon": "dense",
    "llama4_text": "refused: does not run with TRL's fused head",
    "gpt_neo": "refused: differ from the padded path",
    "falcon_alibi": "refused: ALiBi",
    "bloom": "refused: takes no position_ids",
    "mpt": "refused: ALiBi",
    "mamba": "refused: linear_attention",
    "mamba2": "refused: linear_attention",
    "jamba": "refused: linear_attention",
    "bamba": "refused: linear_attention",
    "falcon_h1": "refused: hybrid",
    "lfm2": "refused: conv",
    "qwen3_next": "refused: linear_attention",
    "recurrent_gemma": "refused: linear_attention",
    "zamba2": "refused: linear_attention",
    "granitemoehybrid": "refused: linear_attention",
    "nemotron_h": "refused: linear_attention",
    "minimax": "refused: linear_attention",
    "rwkv": "refused: takes no position_ids",
    "xlstm": "refused: takes no attention_mask",
}
EXACT = {name: verdict for name, verdict in VERDICTS.items() if not verdict.startswith("refused")}
REFUSED = {name: verdict.removeprefix("refused: ") for name, verdict in VERDICTS.items() if name not in EXACT}


def test_every_family_has_a_verdict():
    assert VERDICTS.keys() == SETTINGS.keys()
    assert EXACT.keys() >= PLAIN_FAMILIES


@pytest.mark.parametrize("name", EXACT)
def test_exact_families(name):
    model = tiny_model(name)
    inputs = model_inputs(random_pairs(HARD_SIZES))
    padded = model(**inputs)
    expected = gradients(model, padded)
    verdict = probe(model, max_length=48)
    assert verdict.ok and verdict.attention == EXACT[name], verdict
    assert verdict.error < 1e-4
    for attention in {"dense", *(("segments", "varlen") if verdict.attention == "segments" else ())}:
        packed = PackedPairForward(model, attention=attention, required=True)(**inputs)
        assert_same_outputs(padded, packed)
        assert_same_gradients(expected, gradients(model, packed), 1e-3)
        if padded.aux_loss is not None:
            torch.testing.assert_close(packed.aux_loss, padded.aux_loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_exact_families_are_exact_enough_in_coarse_numbers(name):
    for seed, scale in ((1, 0.05), (0, 0.3)):
        model = tiny_model(name, seed=seed, scale=scale)
        with torch.autocast("cpu", torch.bfloat16):
            assert (verdict := probe(model, max_length=48)).ok, verdict
        assert (verdict := probe(model.to(torch.bfloat16), max_length=48)).ok, verdict


@pytest.mark.parametrize("name", REFUSED)
def test_refused_families(name):
    model = tiny_model(name)
    verdict = probe(model, max_length=48)
    assert not verdict.ok
    assert REFUSED[name] in verdict.reason
    call, _ = packed_forward(model, max_length=48)
    assert call is model


# Those that run a tree mask without complaint: here the numbers alone must give them away.
@pytest.mark.parametrize("name", [n for n, reason in REFUSED.items() if reason != "does not run with TRL's fused head"])
def test_the_probe_refuses_them_without_the_static_check(name, monkeypatch):
    monkeypatch.setattr("trl_cpo.engine.forward.probing.probe.static_reason", lambda model: None)
    monkeypatch.setattr("trl_cpo.engine.forward.adapter.layer_kinds", lambda config: {FULL: LayerKind()})
    monkeypatch.setattr("trl_cpo.engine.forward.backends.layer_kinds", lambda config: {FULL: LayerKind()})
    monkeypatch.setattr("trl_cpo.engine.forward.probing.static_checks.layer_kinds", lambda config: {FULL: LayerKind()})
    monkeypatch.setattr("trl_cpo.engine.forward.probing.probe.unknown_limits", lambda config: [])
    model = tiny_model(name)
    for attention in ("dense", "varlen", "auto"):
        assert not probe(model, attention=attention, max_length=48).ok
    with torch.autocast("cpu", torch.bfloat16):
        assert not probe(model, max_length=48).ok
    assert not probe(model.to(torch.bfloat16), max_length=48).ok


@pytest.mark.parametrize("name", ["gemma2", "llama", "mixtral", "gpt2"])
def test_eager_attention_takes_an_added_mask(name):
    model = tiny_model(name, attention="eager")
    verdict = probe(model, max_length=48)
    assert verdict.ok and verdict.attention == "dense"
    inputs = model_inputs(random_pairs(HARD_SIZES))
    assert_same_outputs(model(**inputs), PackedPairForward(model, required=True)(**inputs))


def test_attention_that_takes_no_mask_is_refused_by_name():
    model = tiny_model("llama")
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in static_reason(model)
