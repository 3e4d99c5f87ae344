"""What rounding does to a model: when it is looked for, and that it is about what narrow arithmetic really does."""

import pytest
import torch

from trl_cpo.engine.forward.probing.rounding import extra_rounding, watch_precision

from helpers.families import tiny_model
from helpers.pair_batches import HARD_SIZES, model_inputs, random_pairs

BFLOAT16 = torch.finfo(torch.bfloat16).eps


def step_of(model, inputs):
    with torch.no_grad(), watch_precision(model) as narrowest:
        model(**inputs)
    return narrowest()


def test_the_narrowest_numbers_are_found_from_within():
    inputs = model_inputs(random_pairs(HARD_SIZES))
    model = tiny_model("llama")
    assert step_of(model, inputs) == 0
    with torch.autocast("cpu", torch.float16):
        assert step_of(model, inputs) == torch.finfo(torch.float16).eps
    forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    assert step_of(model, inputs) == BFLOAT16
    model.forward = forward
    model.lm_head.bfloat16()
    model.lm_head.register_forward_pre_hook(lambda module, args: args[0].bfloat16())
    assert step_of(model, inputs) == BFLOAT16
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("scale", [0.05, 0.2])
def test_it_is_about_what_bfloat16_does(name, scale):
    exact = tiny_model(name, scale=scale).bfloat16().float()
    rounded = tiny_model(name, scale=scale).bfloat16()
    inputs = model_inputs(random_pairs(HARD_SIZES * 3))
    scored = inputs["labels"][:, 1:] != -100
    with torch.no_grad():
        truth, padded = exact(**inputs).log_probs, rounded(**inputs).log_probs
        runs = []
        for _ in range(2):
            with extra_rounding(rounded, BFLOAT16, seed=0):
                runs.append(rounded(**inputs).log_probs)
        assert torch.equal(*runs)
        assert torch.equal(rounded(**inputs).log_probs, padded)
    own = float((padded - truth)[scored].abs().mean())
    assert 0.8 * own < float((runs[0] - padded)[scored].abs().mean()) < 3 * own
