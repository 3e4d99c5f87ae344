"""The probe: it finds every mistake put in on purpose, leaves no trace, and knows how far its finding reaches."""

import dataclasses
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from trl_cpo.engine.forward import NotPackable, PackedPairForward, packed_forward, probe
from trl_cpo.engine.forward import adapter as adapter_module
from trl_cpo.engine.forward.mask import LayerKind, dense_masks, layer_kinds, visible
from trl_cpo.engine.forward.plan import plan_pairs
from trl_cpo.engine.forward.probing import comparison
from trl_cpo.engine.forward.probing import probe as probing
from trl_cpo.engine.forward.probing.rounding import watch_precision
from trl_cpo.engine.forward.probing.static_checks import static_reason
from trl_cpo.engine.forward.sharing import PrefixSharing

from helpers.families import tiny_model
from helpers.forward_checks import ATTENTIONS, assert_same_outputs
from helpers.pair_batches import HARD_SIZES, model_inputs, random_pairs
from helpers.plan_mistakes import (
    chosen_is_shared,
    first_answer_token_from_the_branch,
    pairs_see_each_other,
    positions_off_by_one,
    rejected_sees_chosen,
    running_positions,
)


@pytest.mark.parametrize(
    "mistake",
    [
        running_positions,
        positions_off_by_one,
        rejected_sees_chosen,
        chosen_is_shared,
        pairs_see_each_other,
        first_answer_token_from_the_branch,
    ],
)
@pytest.mark.parametrize("scale", [0.3, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mistake_in_the_plan_is_found(mistake, scale, dtype, monkeypatch):
    model = tiny_model("llama", scale=scale).to(dtype)
    # One row, so that the pairs stand side by side.
    monkeypatch.setattr(adapter_module, "plan_pairs", lambda *a, **k: mistake(plan_pairs(*a, **k | {"one_row": True})))
    assert not probe(model, attention="dense").ok


def test_a_leak_is_found_where_log_probs_tell_nothing(monkeypatch):
    blind = dataclasses.replace(comparison.EXACT, difference=float("inf"), nats=float("inf"))
    monkeypatch.setattr(probing, "EXACT", blind)
    assert probe(tiny_model("llama"), attention="dense").ok
    monkeypatch.setattr(
        adapter_module, "plan_pairs", lambda *a, **k: pairs_see_each_other(plan_pairs(*a, **k | {"one_row": True}))
    )
    assert "when another answer is changed" in probe(tiny_model("llama"), attention="dense").reason


PARTS = {
    "answers' first tokens": [(0, 9), (1, 4), (2, 9), (3, 4)],
    "the beginning of chosen answers": [(0, c) for c in range(10, 25)] + [(1, c) for c in range(5, 20)],
    "the middle of rejected answers": [(2, c) for c in range(25, 37)] + [(3, c) for c in range(20, 32)],
    "the end of rejected answers": [(2, c) for c in range(37, 49)] + [(3, c) for c in range(32, 44)],
}


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_of_the_answers_is_judged_by_itself(name, rounded):
    inputs = model_inputs(random_pairs([(10, 40, 40), (5, 40, 40)]))
    zeros = torch.zeros(4, 49)
    sample = comparison.Sample(inputs, SimpleNamespace(log_probs=zeros), None)
    bounds = comparison.EXACT
    allowed = bounds.difference
    if rounded:
        # A mistake would cost plenty; rounding moves every token by a tenth of a nat.
        bounds, allowed = dataclasses.replace(comparison.ROUNDED, difference=1.0), 0.1
        sample = dataclasses.replace(sample, perturbed=SimpleNamespace(log_probs=zeros + 0.1))
    off = zeros.clone()
    off[tuple(zip(*PARTS[name], strict=True))] = 3 * allowed
    everywhere = SimpleNamespace(log_probs=zeros + 0.9 * allowed)
    assert comparison.compare(sample, everywhere, bounds, mistake=1.0) == pytest.approx(0.9 * allowed)
    with pytest.raises(comparison.Refused, match=name):
        comparison.compare(sample, SimpleNamespace(log_probs=off), bounds, mistake=1.0)


@pytest.mark.parametrize("scale", [0.3, 0.02])
def test_nothing_is_found_where_nothing_is_wrong(scale):
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ATTENTIONS:
            verdict = probe(tiny_model("llama", scale=scale).to(dtype), attention=attention)
            assert verdict.ok or (dtype, scale) == (torch.bfloat16, 0.02), verdict


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("window", [8, 60])
def test_a_window_that_is_one_off_is_found_where_it_binds(name, window, monkeypatch):
    def wrong_kinds(config):
        return {
            n: kind if kind.window is None else LayerKind(window=kind.window + 1) for n, kind in layer_kinds(config).items()
        }

    monkeypatch.setattr(adapter_module, "layer_kinds", wrong_kinds)
    model = tiny_model(name, sliding_window=window)
    assert not probe(model, attention="dense", max_length=100).ok
    assert not probe(model, attention="dense").ok
    assert probe(model, attention="dense", max_length=window).ok == (window == 60)


def test_a_window_hidden_in_the_model_is_found_at_the_full_length():
    # GPT-Neo's local layers keep their window to themselves, and count it in places of the packed row.
    model = tiny_model("gpt_neo", window_size=60)
    assert probe(model, max_length=32).ok
    assert probe(model, max_length=32).max_length == 32
    for longest in (35, 50, 100, None):
        assert not probe(model, max_length=longest).ok


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize(("window", "scale"), [(8, 0.3), (16, 0.05), (32, 0.15), (64, 0.15), (120, 0.15)])
def test_a_hidden_window_is_found_in_coarse_numbers_too(window, scale, how, monkeypatch):
    model = tiny_model("gpt_neo", window_size=window, scale=scale)
    if how == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert "window_size" in probe(model, max_length=128).reason
        # A model whose configuration does not name it: here the numbers alone must give it away.
        monkeypatch.setattr("trl_cpo.engine.forward.probing.probe.unknown_limits", lambda config: [])
        assert "log-probs" in probe(model, max_length=128).reason


def test_a_finding_holds_up_to_the_length_it_was_made_for(caplog):
    model = tiny_model("gpt_neo", window_size=80)
    packed, verdict = packed_forward(model, max_length=40)
    assert verdict.ok
    with caplog.at_level(logging.WARNING):
        for answer, is_packed in ((10, False), (11, False), (5, False), (4, True)):
            inputs = model_inputs(random_pairs([(30, 4, 5), (36, answer, 3)]))  # longest: 36 + answer
            assert_same_outputs(model(**inputs), packed(**inputs))
            assert (packed.last_plan is not None) == is_packed
    assert [r.getMessage() for r in caplog.records] == [
        "Batch run padded, without prefix sharing: a sequence is longer than the 40 tokens probed."
    ]


def test_policy_and_reference_say_once_why_a_batch_is_padded(caplog):
    sharing = PrefixSharing(None, max_length=40)
    inputs = model_inputs(random_pairs([(30, 4, 5), (36, 10, 3)]))
    with caplog.at_level(logging.WARNING):
        for model in (tiny_model("gpt_neo", window_size=80), tiny_model("gpt_neo", window_size=80)):
            for _ in range(2):
                packed = sharing.of(model)
                packed(**inputs)
                assert packed.last_plan is None
    assert [r.getMessage() for r in caplog.records] == [
        "Batch run padded, without prefix sharing: a sequence is longer than the 40 tokens probed."
    ]


def test_a_model_whose_attention_was_changed_since_runs_padded(caplog):
    model = tiny_model("llama")
    packed, verdict = packed_forward(model)
    assert verdict.attention == "segments"
    model.set_attn_implementation("eager")
    inputs = model_inputs(random_pairs(HARD_SIZES))
    with caplog.at_level(logging.WARNING):
        assert_same_outputs(model(**inputs), packed(**inputs))
    assert packed.last_plan is None and "on attention 'eager'" in caplog.text


def test_a_length_the_model_cannot_run_is_refused_in_words():
    model = tiny_model("gpt_bigcode", max_position_embeddings=40)
    assert "fails on sequences of 60 tokens" in probe(model, max_length=60).reason


def test_a_window_nobody_reached_bounds_the_finding():
    assert probe(tiny_model("mistral", sliding_window=60), max_length=50).max_length == 50


def test_a_windowed_family_without_a_known_length_holds_for_any():
    assert probe(tiny_model("mistral", sliding_window=60)).max_length is None
    assert probe(tiny_model("llama")).max_length is None
    assert probe(tiny_model("llama"), max_length=32).max_length is None


def test_the_probe_leaves_no_trace():
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    verdict = probe(model)
    assert verdict.ok
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "both answers of a pair see the same noise" in verdict.notes[0]


def test_a_refused_model_keeps_its_attention(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(adapter_module, "plan_pairs", lambda *a, **k: running_positions(plan_pairs(*a, **k)))
    assert not probe(model).ok
    assert model.config._attn_implementation == "sdpa"


def that_reads_its_attention_s_name(model, wanted):
    """A Llama whose first layer halves what it attends to where its attention is or is not called as wanted."""
    attention = model.model.layers[0].self_attn

    class Reading(type(attention)):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            packed = kwargs["attention_mask"] is not None and kwargs["attention_mask"].dtype == torch.int64
            return out * (0.5 if wanted(self.config._attn_implementation, packed) else 1), weights

    attention.__class__ = Reading
    return model


def state_of_rotary_modules(model):
    modules = [m for m in model.modules() if "Rotary" in type(m).__name__]
    assert modules
    plain = (bool, int, float, str, torch.Tensor)
    return [
        {k: str(v) for k, v in vars(m).items() if isinstance(v, plain)} | {k: str(v) for k, v in m._buffers.items()}
        for m in modules
    ]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize(("name", "changes"), [("mistral", {"sliding_window": 48}), ("deepseek_v3", {})])
def test_frequencies_that_grow_with_what_was_seen_are_what_they_were(name, changes, kind):
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4) if kind == "longrope" else dict(factor=4.0)
    rope = dict(rope_type=kind, rope_theta=1e4, original_max_position_embeddings=24, **factors)
    model = tiny_model(name, rope_parameters=rope, max_position_embeddings=24, **changes)
    # Longer than the 24 positions of the configuration and shorter than the probe's, so that the past has a say.
    inputs = model_inputs(random_pairs([(20, 9, 20), (18, 3, 4)]))
    state = state_of_rotary_modules(model)
    assert probe(model, max_length=100).ok
    assert state_of_rotary_modules(model) == state
    with torch.no_grad():
        before = tiny_model(name, rope_parameters=rope, max_position_embeddings=24, **changes)(**inputs)
        assert torch.equal(model(**inputs).log_probs, before.log_probs)


@pytest.mark.parametrize("only_padded", [False, True])
def test_code_that_asks_for_the_attention_s_name_does_not_get_segments(only_padded):
    def wanted(name, packed):
        return name in ("sdpa", "eager") or (only_padded and packed)

    model = that_reads_its_attention_s_name(tiny_model("llama"), wanted)
    inputs = model_inputs(random_pairs(HARD_SIZES))
    with torch.no_grad():
        before = model(**inputs)
        verdict = probe(model)
        assert verdict.ok and verdict.attention == "dense"
        assert "differ" in probe(model, attention="segments").reason
        assert_same_outputs(before, packed_forward(model)[0](**inputs))
        assert torch.equal(before.log_probs, model(**inputs).log_probs)


def test_a_model_whose_answers_feel_nothing_cannot_be_judged():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert "position_ids" in probe(model).reason


def test_demanded_packing_refuses_instead_of_falling_back():
    with pytest.raises(NotPackable, match="ALiBi"):
        packed_forward(tiny_model("mpt"), required=True)


def test_falling_back_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        call, verdict = packed_forward(model := tiny_model("lfm2"))
    assert call is model and not verdict.ok
    assert len(caplog.records) == 1 and "prefix sharing off" in caplog.text and "conv" in caplog.text


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING"),
        (LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]), "aLoRA"),
    ],
)
def test_adapters_that_do_not_act_token_by_token_are_refused(config, reason):
    assert reason in probe(get_peft_model(tiny_model("llama"), config)).reason


@pytest.mark.parametrize(
    ("module", "refused"),
    [(torch.nn.Conv1d(4, 4, 3), True), (torch.nn.Conv1d(4, 4, 1), False), (torch.nn.GRU(4, 4), True)],
)
def test_modules_that_mix_neighbours_are_refused(module, refused):
    model = tiny_model("llama")
    model.model.layers[0].mixer = module
    assert ("mixes neighbouring tokens" in (static_reason(model) or "")) == refused


def test_attention_in_both_directions_is_refused():
    assert "not causal" in probe(tiny_model("gemma3_text", use_bidirectional_attention=True)).reason


def test_fresh_lora_is_fine():
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    assert probe(model).ok


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(pixel_values=torch.zeros(1)), "pixel_values"),
        (dict(fused_lm_head=False), "fused head"),
        (dict(attention_mask="left"), "padded on the left"),
    ],
)
def test_a_batch_that_cannot_be_packed_runs_padded_or_is_refused(change, reason, caplog):
    calls = []
    packed = PackedPairForward(tiny_model("llama"))
    packed.model = lambda **inputs: calls.append(inputs) or "padded"
    inputs = model_inputs(random_pairs(HARD_SIZES))
    if change.get("attention_mask") == "left":
        change = {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask", "labels")}
    inputs |= change
    with caplog.at_level(logging.WARNING):
        assert packed(**inputs) == "padded"
    assert calls[0].keys() == inputs.keys() and all(calls[0][name] is inputs[name] for name in inputs)
    assert reason in caplog.text
    packed.required = True
    with pytest.raises(NotPackable, match=reason):
        packed(**inputs)


def test_neftune_is_left_to_the_padded_path():
    model = tiny_model("llama").train()
    model.get_input_embeddings().neftune_noise_alpha = 5
    packed = PackedPairForward(model, required=True)
    with pytest.raises(NotPackable, match="NEFTune"):
        packed(**model_inputs(random_pairs(HARD_SIZES)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_padded_length_are_left_to_the_padded_path(kind):
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4) if kind == "longrope" else dict(factor=2.0)
    rope = dict(rope_type=kind, rope_theta=1e4, original_max_position_embeddings=20, **factors)
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=20)
    packed = PackedPairForward(model)
    # The longest row has 22 tokens: 24 columns with padding nobody fills, 22 without.
    for multiple, is_packed in ((8, False), (None, True)):
        inputs = model_inputs(random_pairs([(12, 10, 4), (5, 5, 7)]), pad_to_multiple_of=multiple)
        with torch.no_grad():
            assert_same_outputs(model(**inputs), packed(**inputs))
        assert (packed.last_plan is not None) == is_packed


def test_left_padding_gives_the_padded_numbers():
    model = tiny_model("gpt2")
    inputs = model_inputs(random_pairs(HARD_SIZES))
    inputs |= {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        assert_same_outputs(model(**inputs), PackedPairForward(model)(**inputs))


def test_masks_of_the_mistakes_differ():
    """The mistakes above are real: each changes the mask or the positions of this batch."""
    inputs = model_inputs(random_pairs(HARD_SIZES))
    plan = plan_pairs(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], one_row=True)
    right = visible(plan, LayerKind())
    for mistake in (rejected_sees_chosen, chosen_is_shared, pairs_see_each_other):
        assert not torch.equal(right, visible(mistake(plan), LayerKind()))
    assert dense_masks(plan, {"full_attention": LayerKind()}, None, "cpu").equal(right)


def test_mixed_precision_around_the_forward_is_judged_as_such():
    model = tiny_model("llama")
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    verdict = probe(model)
    assert verdict.ok and verdict.error > 1e-3


def test_code_from_elsewhere_is_tried_at_the_full_length():
    model = tiny_model("llama")
    own = type("LlamaForCausalLM", (type(model),), {"__module__": "somebody.modeling"})
    model.__class__ = own
    assert probe(model, max_length=40).max_length == 40


def test_importing_it_loads_neither_transformers_nor_trl():
    code = "import sys, trl_cpo.engine.forward; print(*{'transformers', 'trl', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(("products", "dtype"), [("ieee", None), ("tf32", torch.float16), ("bf16", torch.bfloat16)])
def test_coarse_products_of_float32_are_rounding_too(products, dtype, monkeypatch):
    # Whoever asks CUDA for its older setting where the newer one was used gets an error.
    monkeypatch.setattr("trl_cpo.engine.forward.probing.rounding.float32_products", lambda device: products)
    model = tiny_model("llama")
    with watch_precision(model) as step:
        model(input_ids=torch.tensor([[1, 2, 3]]))
        assert step() == (0 if dtype is None else torch.finfo(dtype).eps)
