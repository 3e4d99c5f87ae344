"""The same batch twice: the same bits, under deterministic algorithms; and without them, as measured."""

import pytest
import torch

from trl_cpo.engine.forward import PackedPairForward

from helpers.families import tiny_model
from helpers.on_gpu import ON_GPU, REHEARSAL, moved
from helpers.pair_batches import model_inputs, random_pairs

pytestmark = ON_GPU

SIZES = [(30, 20, 9), (1, 40, 60)] if REHEARSAL else [(400, 200, 90), (1, 400, 600), (800, 77, 130), (256, 256, 256)] * 2
SHAPE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)


def twice(call, model, inputs) -> list[str]:
    """What differs between two runs: log-probabilities or gradients, by name."""
    runs = []
    for _ in range(2):
        model.zero_grad()
        outputs = call(**inputs)
        (outputs.log_probs.float() * torch.linspace(-1, 1, outputs.log_probs.size(1), device=model.device)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        runs.append({"log_probs": outputs.log_probs.detach(), **gradients})
    return [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]


@pytest.fixture
def model(device):
    return tiny_model("llama", scale=0.05, **SHAPE).to(device, torch.bfloat16)


@pytest.mark.parametrize("attention", ["varlen", "segments", "dense", None])
def test_repeats_are_equal_to_the_bit(attention, model, deterministic):
    inputs = moved(model_inputs(random_pairs(SIZES)))
    call = PackedPairForward(model, attention=attention, required=True) if attention else model
    assert twice(call, model, inputs) == []


@pytest.mark.parametrize("attention", ["varlen", None])
def test_repeats_without_the_switch_are_measured(attention, model, record):
    inputs = moved(model_inputs(random_pairs(SIZES)))
    call = PackedPairForward(model, attention=attention, required=True) if attention else model
    different = twice(call, model, inputs)
    record(path=attention or "padded", differs=len(different), names=different[:6])
    assert "log_probs" not in different
