"""A model is run to look at it, and nothing about it or the program has changed afterwards."""

import random

import numpy as np
import pytest
import torch

from trl_cpo.engine.model_state import evaluation_mode, keep_trainable, snapshot

from helpers.tiny import make_model


def states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]]


def test_modes_random_states_and_gradients_are_as_they_were_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)))
    model[1].eval()
    other = torch.nn.Dropout(0.5)
    modes, before = [module.training for module in model.modules()], states()

    def score_and_fail():
        with evaluation_mode(model, None, other):
            assert not any(module.training for module in (*model.modules(), other)) and not torch.is_grad_enabled()
            torch.rand(3), random.random(), np.random.rand()
            raise KeyError("on the way")

    with pytest.raises(KeyError, match="on the way"):
        score_and_fail()
    assert [module.training for module in model.modules()] == modes and other.training and torch.is_grad_enabled()
    assert states() == before


def test_what_modules_keep_of_a_run_is_put_back():
    """A module as some rotary embeddings are: a buffer and a number that follow the longest sequence seen."""

    class Growing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.longest = 4
            self.register_buffer("frequencies", torch.arange(4.0), persistent=False)

        def forward(self, length: int):
            self.longest, self.seen = length, True
            self.frequencies += 1
            self.register_buffer("more", torch.zeros(1))

    model = Growing()
    with evaluation_mode(model):
        model(9)
        assert model.longest == 9
    assert model.longest == 4 and not hasattr(model, "seen") and list(model._buffers) == ["frequencies"]
    assert model.frequencies.tolist() == [0, 1, 2, 3] and model.state_dict() == {}
    restore = snapshot(model)
    model(5)
    restore()
    assert model.longest == 4 and model.frequencies.tolist() == [0, 1, 2, 3]


class Repacked(torch.nn.Linear):
    """As bitsandbytes' 4-bit layer on a CPU with AVX512-BF16: repacked, for good, by a forward in evaluation."""

    support_avx512bf16_for_cpu = True
    repacked = False

    def forward(self, x):
        if not self.training and self.support_avx512bf16_for_cpu:
            self.repacked = True
        return super().forward(x)


def test_layers_that_an_evaluation_would_repack_are_not_repacked():
    model = torch.nn.Sequential(Repacked(2, 2))
    with evaluation_mode(model):
        model(torch.zeros(1, 2))
    assert not model[0].repacked and model[0].support_avx512bf16_for_cpu
    model.eval()
    keep_trainable(model)
    model(torch.zeros(1, 2))
    assert not model[0].repacked
    model[0].support_avx512bf16_for_cpu = True
    model(torch.zeros(1, 2))
    assert model[0].repacked  # the stand-in does what it stands for


def test_a_transformers_model_gives_the_same_afterwards():
    model = make_model(attention_dropout=0.5).train()
    inputs = torch.arange(3, 20)[None]
    with evaluation_mode(model):
        first = model(inputs).logits
        assert torch.equal(first, model(inputs).logits) and not first.requires_grad
    assert model.training and not torch.equal(model(inputs).logits, first)


def test_layers_are_looked_through_on_a_cpu_alone():
    models = {device: torch.nn.Sequential(Repacked(2, 2)).to(device) for device in ("cpu", "meta")}
    for model in models.values():
        keep_trainable(model)
    assert {device: model[0].support_avx512bf16_for_cpu for device, model in models.items()} == {"cpu": False, "meta": True}


def test_a_layer_that_a_model_got_later_is_kept_too():
    model = torch.nn.Sequential(Repacked(2, 2))
    keep_trainable(model)
    model.append(Repacked(2, 2))
    keep_trainable(model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in model)
