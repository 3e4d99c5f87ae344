"""Which back end a model gets: by its attention, what it needs, its device and its dtype."""

import pytest
import torch
from trl.trainer.utils import disable_dropout_in_model

from trl_cpo.engine.forward import PackedPairForward, backends, probe, varlen
from trl_cpo.engine.forward.backends import (
    BACK_ENDS,
    CHUNKS,
    DENSE,
    DROPOUT,
    LARGE_HEADS,
    SEGMENTS,
    SINKS,
    SOFTCAP,
    VARLEN,
    WINDOWS,
    choose,
    needs_of,
    product_dtype,
)

from helpers.families import tiny_model

AMPERE, TURING = (8, 0), (7, 5)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("implementation", "needs", "device", "capability", "dtype", "chosen"),
    [
        ("sdpa", [], "cpu", None, torch.float32, [SEGMENTS, DENSE]),
        ("sdpa", [], "cpu", None, BF16, [SEGMENTS, DENSE]),
        ("sdpa", [WINDOWS], "cuda", AMPERE, BF16, [VARLEN, SEGMENTS, DENSE]),
        ("sdpa", [], "cuda", (9, 0), torch.float16, [VARLEN, SEGMENTS, DENSE]),
        ("sdpa", [], "cuda", AMPERE, torch.float32, [SEGMENTS, DENSE]),
        ("sdpa", [], "cuda", TURING, torch.float16, [SEGMENTS, DENSE]),
        ("sdpa", [DROPOUT], "cuda", AMPERE, BF16, [SEGMENTS, DENSE]),
        ("sdpa", [CHUNKS], "cuda", AMPERE, BF16, [SEGMENTS, DENSE]),
        ("sdpa", [LARGE_HEADS], "cuda", AMPERE, BF16, [SEGMENTS, DENSE]),
        ("sdpa", [SOFTCAP], "cuda", AMPERE, BF16, [DENSE]),
        ("sdpa", [SINKS, WINDOWS], "cuda", AMPERE, BF16, [DENSE]),
        ("eager", [], "cuda", AMPERE, BF16, [DENSE]),
        ("eager", [], "cpu", None, torch.float32, [DENSE]),
    ],
)
def test_the_choice(implementation, needs, device, capability, dtype, chosen):
    choice = choose(implementation, frozenset(needs), device, capability, dtype)
    assert list(choice.names) == chosen
    left_out = (device, implementation) == ("cuda", "sdpa") and capability >= AMPERE and dtype != torch.float32
    assert bool(choice.why) == (left_out and VARLEN not in chosen)
    if choice.why:
        assert f"varlen cannot do {needs[0]}" in choice.why


@pytest.mark.parametrize(("needs", "chosen"), [([], [VARLEN, SEGMENTS, DENSE]), ([WINDOWS], [SEGMENTS, DENSE])])
def test_a_torch_whose_call_does_no_windows(needs, chosen, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, is_causal: None)
    assert list(choose("sdpa", frozenset(needs), "cuda", AMPERE, BF16).names) == chosen
    monkeypatch.setattr(varlen, "varlen_attn", None)
    choice = choose("sdpa", frozenset(needs), "cuda", AMPERE, BF16)
    assert list(choice.names) == [SEGMENTS, DENSE] and "this torch" in choice.why


@pytest.mark.parametrize(
    ("name", "changes", "needs"),
    [
        ("llama", {}, []),
        ("llama", dict(attention_dropout=0.1), [DROPOUT]),
        ("gpt2", {}, [DROPOUT]),
        ("opt", dict(attention_dropout=0.1), [DROPOUT]),
        ("opt", {}, []),
        ("mistral", {}, [WINDOWS]),
        ("gemma2", {}, [SOFTCAP, WINDOWS]),
        ("gpt_oss", {}, [SINKS, WINDOWS]),
        ("llama4_text", {}, [CHUNKS]),
        ("qwen3", dict(head_dim=512), [LARGE_HEADS]),
        ("deepseek_v3", dict(qk_nope_head_dim=200, qk_rope_head_dim=64), [LARGE_HEADS]),
        ("deepseek_v3", {}, []),
    ],
)
def test_what_a_model_needs(name, changes, needs):
    assert needs_of(tiny_model(name, **changes)) == frozenset(needs)


def test_dropout_that_trl_turns_off_is_no_need():
    model = tiny_model("gpt2")
    disable_dropout_in_model(model)
    assert needs_of(model) == frozenset()


def test_products_are_of_the_autocast_of_the_moment():
    model = tiny_model("llama")
    assert product_dtype(model) == torch.float32
    with torch.autocast("cpu", BF16):
        assert product_dtype(model) == BF16
    assert product_dtype(model.half()) == torch.float16


@pytest.mark.parametrize("name", ["qwen3", "mistral", "deepseek_v3", "gemma3_text", "mixtral"])
def test_the_probe_accepts_families_over_varlen(name):
    model = tiny_model(name)
    verdict = probe(model, attention="varlen", max_length=48)
    assert verdict.ok and verdict.error < 1e-4, verdict
    assert model.config._attn_implementation == varlen.NAME
    assert "varlen attention: torch.nn.attention.varlen, float32" in str(verdict)


def test_softcapping_is_left_to_masks_and_said(monkeypatch):
    assert "needs sdpa" in probe(tiny_model("gemma2"), attention="varlen").reason
    gemma = tiny_model("gemma2")
    gemma.config._attn_implementation = "sdpa"  # its sdpa refuses softcapping: nothing is left but masks
    monkeypatch.setattr(backends, "choose", lambda *_: choose("sdpa", needs_of(gemma), "cuda", AMPERE, BF16))
    assert backends.choice_for(gemma).names == (DENSE,)
    verdict = probe(tiny_model("gemma2"))
    assert verdict.ok and verdict.attention == DENSE
    assert "dense attention (varlen cannot do softcapping; segments cannot do softcapping)" in str(verdict)


def test_the_next_back_end_is_tried_where_a_kernel_fails(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_: choose("sdpa", frozenset(), "cuda", AMPERE, BF16))
    assert probe(tiny_model("llama")).attention == VARLEN

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(varlen, "_call", broken)
    model = tiny_model("llama")
    verdict = probe(model)
    assert verdict.attention == SEGMENTS and "(not varlen: it fails on packed rows: RuntimeError: no kernel" in str(verdict)
    assert "no kernel image" in probe(model, attention="varlen").reason


def test_a_model_moves_between_back_ends():
    model = tiny_model("llama")
    for name in (SEGMENTS, VARLEN, DENSE, SEGMENTS):
        assert probe(model, attention=name).ok
    backends.switch_back(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_unknown_back_end_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=", ".join(map(repr, sorted(BACK_ENDS)))):
        PackedPairForward(tiny_model("llama"), attention="flash")
