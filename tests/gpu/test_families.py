"""Model families on the device: which attention each gets, and that packed is as near to float64 as padded."""

from contextlib import nullcontext

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from trl_cpo.engine.forward import PackedPairForward, probe
from trl_cpo.engine.forward.backends import choice_for

from helpers.families import tiny_model
from helpers.on_gpu import ON_GPU, moved, some
from helpers.pair_batches import HARD_SIZES, model_inputs, random_pairs

pytestmark = ON_GPU

_NO_DROPOUT = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
#: Family, the attention that it gets in half precision, and changes of its tiny configuration.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("varlen", dict(hidden_size=128)),
    "qwen2": ("varlen", dict(hidden_size=64)),
    "qwen3": ("varlen", dict(head_dim=64)),
    "mistral": ("varlen", {}),
    "gemma": ("varlen", dict(head_dim=256)),
    "gemma3_text": ("varlen", dict(head_dim=64, query_pre_attn_scalar=64)),
    "phi3": ("varlen", {}),
    "gpt2": ("varlen", _NO_DROPOUT),
    "gpt_neox": ("varlen", dict(attention_dropout=0.0, hidden_dropout=0.0)),
    "granite": ("varlen", {}),
    "cohere": ("varlen", {}),
    "olmo3": ("varlen", {}),
    "smollm3": ("varlen", {}),
    "deepseek_v3": ("varlen", dict(qk_nope_head_dim=16)),
    "mixtral": ("varlen", {}),
    "qwen3_moe": ("varlen", {}),
    "gemma2": ("dense", {}),
    "gpt_oss": ("dense", {}),
}
NARROW = {name: attention for name, (attention, _) in FAMILIES.items()}


def inputs_for(seeds: int = 2) -> list[dict]:
    return [model_inputs(random_pairs(HARD_SIZES * 3, seed)) for seed in range(seeds)]


def run(call, model, inputs, log_probs) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the scored tokens, and the gradient of their weighted sum, in float64 on the CPU."""
    scored = inputs["labels"][:, 1:] != -100
    model.zero_grad()
    found = log_probs(call, inputs)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(found.device)
    (found.double() * weight * scored).sum().backward()
    gradients = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return found.detach().double()[scored].cpu(), torch.cat(gradients)


def of_logits(call, inputs):
    """By the definition, without TRL's fused head, which computes in narrow numbers."""
    logits = call(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    labels = inputs["labels"][:, 1:]
    return logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


@pytest.mark.parametrize("weights", ["bf16", "float32 under autocast"])
@pytest.mark.parametrize("name", some(list(FAMILIES)))
def test_packed_is_as_near_to_float64_as_padded(name, weights, device, record):
    expected, changes = FAMILIES[name]
    model = tiny_model(name, scale=0.1, **changes)
    if weights == "bf16":
        model = model.bfloat16()
    # On the CPU, so that it shares no kernel with what it judges. Eager attention's softmax is in float32 in any case.
    wide = torch.float32 if expected == "dense" else torch.float64
    exact = tiny_model(name, scale=0.1, **changes).to(wide)
    mixture = getattr(exact.config, "num_experts_per_tok", None) is not None
    if mixture and exact._can_set_experts_implementation():
        exact.set_experts_implementation("eager")  # the others know no float64
    exact.load_state_dict({key: value.to(wide) for key, value in model.state_dict().items()})
    model = model.to(device)
    precision = nullcontext() if weights == "bf16" else torch.autocast(device.type, torch.bfloat16)
    with precision:
        verdict = probe(model, max_length=48)
    # A mixture's router may send a token to another expert in one path alone, and the probe may take that for a mistake.
    assert verdict.ok and verdict.attention in (expected, *(["segments"] if mixture else [])), verdict

    def fused(call, inputs):
        with precision:
            return call(**inputs).log_probs

    errors = {"padded": [], "packed": []}
    norms = {"padded": [], "packed": []}
    for inputs in inputs_for():
        truth, gradient = run(exact, exact, inputs, of_logits)
        inputs = moved(inputs)
        packed = PackedPairForward(model, attention=expected, required=True)
        for path, call in (("padded", model), ("packed", packed)):
            found, its = run(call, model, inputs, fused)
            errors[path].append(found - truth)
            norms[path].append(float((its - gradient).norm() / gradient.norm()))
    largest, mean = ({path: float(f(torch.cat(e).abs())) for path, e in errors.items()} for f in (torch.max, torch.mean))
    gradient_error = {path: sum(values) / len(values) for path, values in norms.items()}
    record(attention=verdict.attention, why=verdict.why, mean=mean, largest=largest, gradient=gradient_error)
    assert mean["padded"] > 1e-4, "rounding must show for the rest to say something"
    assert mean["packed"] <= 2 * mean["padded"]
    assert gradient_error["packed"] <= 2 * gradient_error["padded"]
    if not mixture:
        assert largest["packed"] <= 2 * largest["padded"]


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3", "gemma2"])
def test_float32_is_left_to_segments_and_masks(name, device, record):
    model = tiny_model(name, **FAMILIES[name][1]).to(device)
    verdict = probe(model, max_length=48)
    assert verdict.ok and verdict.attention == {"gemma2": "dense"}.get(name, "segments"), verdict
    inputs = moved(model_inputs(random_pairs(HARD_SIZES)))
    with torch.no_grad():
        padded = model(**inputs).log_probs
        packed = PackedPairForward(model, attention=verdict.attention, required=True)(**inputs).log_probs
    difference = float((packed - padded).abs().max())
    record(attention=verdict.attention, error=verdict.error, difference=difference)
    assert difference < 1e-2


def test_the_attention_is_chosen_before_it_is_tried(device):
    names = {}
    for name in FAMILIES:
        model = tiny_model(name, **FAMILIES[name][1]).to(device, torch.bfloat16)
        add_fused_lm_head(model)
        names[name] = choice_for(model).names[0]
    assert names == NARROW
