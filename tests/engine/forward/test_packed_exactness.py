"""The packed forward against TRL's padded one: every output, gradients, precision, composition."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import add_fused_lm_head

from trl_cpo.engine.forward import PackedPairForward

from helpers.families import tiny_model
from helpers.forward_checks import ATTENTIONS, assert_same_gradients, assert_same_outputs, gradients
from helpers.pair_batches import COLLATOR, HARD_SIZES, PAIRS, model_inputs, random_pairs


@pytest.fixture(scope="module")
def models():
    """One model a kind of attention, so that switching one does not touch the other."""
    return {attention: tiny_model("llama") for attention in ATTENTIONS}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_outputs_and_gradients_are_the_padded_ones(models, attention):
    model = models[attention]
    inputs = model_inputs(random_pairs(HARD_SIZES))
    padded = model(**inputs)
    expected = gradients(model, padded)
    packed = PackedPairForward(model, attention=attention, required=True)(**inputs)
    assert_same_outputs(padded, packed)
    assert_same_gradients(expected, gradients(model, packed))


@pytest.mark.parametrize("attention", ATTENTIONS)
@settings(max_examples=40, deadline=None)
@given(PAIRS, COLLATOR)
def test_any_batch_gives_the_padded_outputs(models, attention, pairs, collator):
    model = models[attention]
    inputs = model_inputs(pairs, **collator)
    packed = PackedPairForward(model, attention=attention, required=True)
    with torch.no_grad():
        assert_same_outputs(model(**inputs), packed(**inputs))


@settings(max_examples=15, deadline=None)
@given(PAIRS, COLLATOR, st.sampled_from(ATTENTIONS))
def test_any_batch_gives_the_padded_gradients(models, pairs, collator, attention):
    model = models[attention]
    inputs = model_inputs(pairs, **collator)
    packed = PackedPairForward(model, attention=attention, required=True)
    assert_same_gradients(gradients(model, model(**inputs)), gradients(model, packed(**inputs)))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("row_length", [None, 1, 64, 1000])
def test_a_pairs_numbers_do_not_depend_on_its_company(models, attention, row_length):
    packed = PackedPairForward(models[attention], attention=attention, row_length=row_length, required=True)
    pairs = random_pairs(HARD_SIZES)
    with torch.no_grad():
        together = packed(**model_inputs(pairs)).log_probs.sum(1)
        for i, pair in enumerate(pairs):
            alone = packed(**model_inputs([pair])).log_probs.sum(1)
            torch.testing.assert_close(together[[i, i + len(pairs)]], alone, atol=2e-4, rtol=0)
        reverse = packed(**model_inputs(pairs[::-1])).log_probs.sum(1)
    torch.testing.assert_close(reverse.view(2, -1).flip(1).reshape(-1), together, atol=2e-4, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_prompts_that_fill_max_length_leave_nothing_scored(models, attention):
    model = models[attention].train()
    inputs = model_inputs(random_pairs([(12, 3, 4), (9, 2, 5)]), max_length=9)
    packed = PackedPairForward(model, attention=attention, required=True)(**inputs)
    assert not packed.label_mask.any() and not packed.log_probs.any()
    assert packed.loss.item() == 0
    assert all(float(g.abs().max()) == 0 for g in gradients(model, packed).values())
    model.eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_equal_answers_have_equal_log_probs_to_the_bit(models, attention):
    (prompt, answer, _), *_ = random_pairs([(6, 5, 5)])
    packed = PackedPairForward(models[attention], attention=attention, required=True)
    chosen, rejected = packed(**model_inputs([(prompt, answer, answer)])).log_probs
    assert torch.equal(chosen, rejected)
    assert packed.last_plan.tokens == 11


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_answers_that_start_alike_share_their_start(models, attention):
    model = models[attention]
    inputs = model_inputs(random_pairs([(6, 8, 9), (4, 3, 7)], start_alike=3))
    packed = PackedPairForward(model, attention=attention, required=True)
    assert_same_outputs(model(**inputs), packed(**inputs))
    assert [p.shared for p in packed.last_plan.parts] == [9, 7]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bf16_is_as_near_to_float64_as_the_padded_path(attention):
    rounded = tiny_model("llama", scale=0.2).to(torch.bfloat16)
    exact = copy.deepcopy(rounded).to(torch.float64)
    add_fused_lm_head(exact)
    inputs = model_inputs(random_pairs(HARD_SIZES * 3))
    with torch.no_grad():
        truth = _float64_log_probs(exact, inputs)
        padded = rounded(**inputs).log_probs - truth
        packed = PackedPairForward(rounded, attention=attention, required=True)(**inputs).log_probs - truth
    where = inputs["labels"][:, 1:] != -100
    assert float(padded[where].abs().max()) > 1e-3
    assert float(packed[where].abs().max()) <= 2 * float(padded[where].abs().max())
    assert float(packed[where].square().mean()) <= 4 * float(padded[where].square().mean())


def test_eager_attention_gets_its_mask_in_the_dtype_of_the_weights():
    model = tiny_model("llama", attention="eager").to(torch.bfloat16)
    seen = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["attention_mask"].dtype), with_kwargs=True)
    with torch.no_grad():
        PackedPairForward(model, required=True)(**model_inputs(random_pairs(HARD_SIZES)))
    assert seen == [torch.bfloat16]


def _float64_log_probs(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    labels = inputs["labels"][:, 1:]
    picked = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels == -100, 0)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_mixtures_auxiliary_loss_counts_a_shared_token_in_both_rows(name, attention):
    model = tiny_model(name)
    inputs = model_inputs(random_pairs(HARD_SIZES)) | {"output_router_logits": True}
    padded = model(**inputs)
    padded.aux_loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    packed = PackedPairForward(model, attention=attention, required=True)(**inputs)
    packed.aux_loss.backward()
    torch.testing.assert_close(packed.aux_loss, padded.aux_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=1e-5)
    assert expected
    assert_same_gradients(expected, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, 1e-3)


def test_only_scored_places_reach_the_head(models, monkeypatch):
    model = models["segments"]
    inputs = model_inputs(random_pairs(HARD_SIZES))
    packed = PackedPairForward(model, attention="segments", required=True)
    seen = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(kw) or original(**kw))
    packed(**inputs)
    assert len(seen) == 1
    assert seen[0]["shift_labels"].shape == (1, int((inputs["labels"][:, 1:] != -100).sum()))
    assert seen[0]["fused_lm_head"] is True and "labels" not in seen[0]


def test_the_model_is_left_without_hooks(models):
    model = models["dense"]
    PackedPairForward(model, required=True)(**model_inputs(random_pairs(HARD_SIZES)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
