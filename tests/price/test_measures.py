"""The measures by themselves: repetition, KL, sampling, intervals, the start."""

import itertools

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from trl_cpo.engine.model_state import evaluation_mode
from trl_cpo.price.answers import Answers, answer, end_tokens
from trl_cpo.price.divergence import answer_kl, token_logps
from trl_cpo.price.document import AnswerRecord, Estimate, SetPrice
from trl_cpo.price.repetition import repeated
from trl_cpo.price.start import Start

from helpers.tiny import make_lora, make_mamba, make_model, make_moe, make_tokenizer


def sampled(model, prompts, new=10, greedy=0, ends=(2,)):
    with evaluation_mode(model):
        torch.manual_seed(5)
        return answer(model, prompts, greedy=greedy, max_new_tokens=new, ends=ends, pad=2)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [([], (0, 0)), ([1, 2], (0, 0)), ([1, 2, 3], (0, 1)), ([1, 1, 1, 1, 1], (2, 3)), ([1, 2, 1, 2, 1, 2], (2, 4))],
)
def test_repetition_by_hand(tokens, found):
    assert repeated(tokens) == found


def test_kl_is_that_of_each_answer_without_padding():
    """Rows of several lengths in one padded batch give what each gives alone, written out from logits in float64."""
    policy, reference = make_model(0).eval(), make_model(1).eval()
    answers = sampled(policy, [[5, 6, 7, 8, 9], [11], [20, 21, 22]])
    found = answer_kl(answers, reference)
    for row in range(3):
        ids = answers.ids[row][answers.mask[row]]
        said = len(answers.tokens(row))
        with torch.no_grad():
            p, q = (model(ids[None]).logits[0].double().log_softmax(-1) for model in (policy, reference))
        by_hand = (p.exp() * (p - q)).sum(-1)[-said - 1 : -1]
        torch.testing.assert_close(found[row, :said].double(), by_hand, rtol=1e-4, atol=1e-5)
        assert (found[row, said:] == 0).all()
        assert found[row, :said].min() > 0.01, "the models must differ for this to say something"


def test_kl_of_a_model_to_itself_is_zero():
    model = make_model().eval()
    assert (answer_kl(sampled(model, [[5, 6], [7, 8, 9]]), model) < 1e-5).all()


def test_the_mean_over_samples_is_the_kl_of_responses():
    """Against the sum over every response of two tokens, of a vocabulary of 7: within four standard errors."""
    settings = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=7)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(LlamaConfig(**settings, initializer_range=1.0, bos_token_id=0, eos_token_id=1)).eval())
    policy, reference = models

    def logp(model, tokens):
        with torch.no_grad():
            logps = model(torch.tensor([[3, *tokens]])).logits[0].double().log_softmax(-1)
        return sum(float(logps[at, token]) for at, token in enumerate(tokens))

    responses = [(1,), *((a, b) for a, b in itertools.product(range(7), repeat=2) if a != 1)]
    exact = sum(np.exp(logp(policy, r)) * (logp(policy, r) - logp(reference, r)) for r in responses)
    found = answer_kl(sampled(policy, [[3]] * 2000, new=2, ends=(1,)), reference).sum(1).double()
    error = float(found.std()) / len(found) ** 0.5
    assert exact > 0.1
    assert abs(float(found.mean()) - exact) < 4 * error


@pytest.mark.parametrize("make", [make_model, make_moe, make_mamba])
def test_greedy_rows_are_the_models_own_greedy_answers(make):
    model = make().eval()
    prompt = [5, 6, 7]
    own = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=2, pad_token_id=2)
    own = own[0, 3:].tolist()
    found = sampled(model, [prompt, prompt], greedy=1)
    assert found.tokens(0) == own[: own.index(2) + 1] if 2 in own else own
    assert found.tokens(1) != found.tokens(0)


def test_the_models_own_settings_for_generating_do_not_count():
    model = make_model().eval()
    plain = sampled(model, [[5, 6]] * 4)
    model.generation_config = GenerationConfig(temperature=0.01, top_k=1, repetition_penalty=3.0, max_new_tokens=3)
    own = model.generation_config
    assert torch.equal(sampled(model, [[5, 6]] * 4).ids, plain.ids)
    assert model.generation_config is own


def test_an_answer_ends_with_its_end_token():
    answers = Answers(
        ids=torch.tensor([[9, 4, 2, 2], [9, 4, 5, 6]]),
        mask=torch.tensor([[True, True, True, False], [True] * 4]),
        new=3,
        ended=torch.tensor([True, False]),
    )
    assert [answers.tokens(row) for row in range(2)] == [[4, 2], [4, 5, 6]]


def test_end_tokens_are_the_tokenizers_and_the_models():
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = [0, 2]
    assert end_tokens(model, tokenizer) == [0, 2]
    model.generation_config.eos_token_id, tokenizer.eos_token = None, None
    assert end_tokens(model, tokenizer) == []


def test_without_an_end_token_answers_are_cut():
    answers = sampled(make_model().eval(), [[5, 6]], ends=())
    assert len(answers.tokens(0)) == 10 and not answers.ended[0]


def test_likelihoods_by_hand():
    model = make_model().eval()
    with torch.no_grad():
        found = token_logps(model, torch.tensor([[0, 5, 6, 7]]), torch.tensor([[False, True, True, True]]), 2)
        logps = model(torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found[0], torch.stack([logps[0, 6], logps[1, 7]]))


def test_estimates():
    estimate = Estimate.ratio([1.0, 3.0], [2.0, 2.0])
    assert estimate.value == 1.0 and estimate.low == 0.5 and estimate.high == 1.5
    assert Estimate.ratio([0.0], [0.0]) == Estimate(0.0, 0.0, 0.0)
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        drawn = rng.normal(1.0, 1.0, size=60)
        found = Estimate.ratio(drawn, np.ones(60))
        inside += found.low <= 1.0 <= found.high
    assert 178 <= inside <= 199, "95 % of intervals hold the mean"


def test_a_set_weighs_tokens_and_keeps_the_order_of_prompts():
    records = [
        AnswerRecord(1, "b", "B", repeated=0, grams=2, tokens=4, ended=False, kl=3.0, sampled_tokens=1),
        AnswerRecord(0, "a", "A", repeated=4, grams=8, tokens=10, ended=True, kl=1.0, sampled_tokens=7),
    ]
    price = SetPrice.of(records)
    assert price.kl.value == 0.5 and price.kl_response.value == 2.0
    assert price.repetition.value == 0.4 and price.tokens.value == 7.0 and price.ended.value == 0.5
    assert [sample["prompt"] for sample in price.samples] == ["a", "b"]


@pytest.mark.parametrize("lora", [False, True])
def test_the_start_is_put_back_for_a_moment(lora):
    from peft import get_peft_model

    model = make_model()
    if lora:
        model = get_peft_model(model, make_lora(init_lora_weights=True))
    ids = torch.tensor([[5, 6, 7]])
    at_start = model(ids).logits.detach()
    start = Start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert not torch.equal(model(ids).logits, at_start)
    with start.put_back(model):
        assert torch.equal(model(ids).logits, at_start)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())
    with pytest.raises(KeyError), start.put_back(model):
        raise KeyError
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())
