"""Models of common sizes with random weights, and the useful work of a step."""

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config, Qwen3Config

from .lengths import Lengths

_QWEN2 = dict(vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True)
CONFIGS = {
    "0.5b": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, **_QWEN2
    ),
    "1.5b": Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, **_QWEN2
    ),
    "8b": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    ),
    "tiny": Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=400,
        tie_word_embeddings=False,
    ),
}


def lora() -> LoraConfig:
    """The adapters of the LoRA rows."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def make(size: str, *, quantized: bool, device: torch.device, layers: int | None = None) -> Any:
    """A model with random bfloat16 weights on a device; `quantized`: its linear layers in 4 bits (NF4), but for the head."""
    config = CONFIGS[size].__class__(**{**CONFIGS[size].to_dict(), "dtype": "bfloat16"})
    if layers is not None:
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    config.pad_token_id = config.eos_token_id = 2
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if quantized:
        _quantize(model)
    return model


def _quantize(model: Any) -> None:
    """Puts 4-bit layers in the place of linear ones, as loading with BitsAndBytesConfig does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        place = module.weight.device
        layer = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        if module.bias is not None:
            layer.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(place))
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)


def useful_operations(config: PreTrainedConfig, lengths: Iterable[Lengths], *, full: bool) -> float:
    """Useful floating-point operations of pairs: each distinct token once, 2 a multiply-add, nothing computed twice.

    With N weights, a token costs 2N forward, and backward 4N (full) or 2N (adapters, whose base gets no weight gradients).
    Attention costs 4 · heads · size · (keys seen) a query and layer forward, twice that backward. The head scores completion
    tokens alone; embeddings are look-ups.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    width = heads * size
    layer = 2 * hidden * width + 2 * hidden * size * config.num_key_value_heads + 3 * hidden * config.intermediate_size
    total = 0.0
    for prompt, *answers in lengths:
        seen = prompt**2 / 2 + sum(prompt * answer + answer**2 / 2 for answer in answers)
        dense = 2 * config.num_hidden_layers * layer * (prompt + sum(answers))
        dense += 2 * hidden * config.vocab_size * sum(answers)
        total += dense * (3 if full else 2) + 3 * 4 * config.num_hidden_layers * width * seen
    return total
