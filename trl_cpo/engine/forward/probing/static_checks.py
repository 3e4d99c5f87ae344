"""Checks that need no forward: a reason not to pack, and the lengths that the probe must cover."""

import inspect
import re

import torch

from ..backends import MASKED_ATTENTION, is_kernel
from ..mask import layer_kinds
from ..plan import NotPackable
from ..repack import backbone_of, layers_around, unwrap

# Model families whose layers mix tokens only through masked attention, with every limit in the configuration; checked by
# tests/engine/forward/test_model_families.py. Other families are probed over the full length, in case a limit takes effect
# only there.
PLAIN_FAMILIES = frozenset(
    [
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_neox",
        "granite",
        "granitemoe",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    ]
)

# Adapters that act on each token separately. A fresh adapter has no effect yet, so the probe cannot test it.
TOKENWISE_ADAPTERS = frozenset(
    [
        "ADALORA",
        "BOFT",
        "C3A",
        "DELORA",
        "FOURIERFT",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "TRAINABLE_TOKENS",
        "VBLORA",
        "VERA",
        "WAVEFT",
    ]
)

_LIMIT = re.compile(r"window|chunk|local|block_size|block_length|sparse|dilat|stride|index_topk|compress")
_KNOWN_LIMITS = frozenset(
    [
        "attention_chunk_size",
        "chunk_size_feed_forward",
        "max_window_layers",
        "num_local_experts",
        "sliding_window",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    ]
)


def static_reason(model: torch.nn.Module) -> str | None:
    """Why a model cannot be packed, as far as its configuration and modules show; None if no reason is found.

    Args:
        model: causal language model, bare or wrapped.
    """
    if any(isinstance(layer, torch.nn.DataParallel) for layer in layers_around(model)):
        return "DataParallel splits rows that belong together; launch one process per device"
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return f"{type(inner).__name__} is not a transformers model"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    text = config.get_text_config()
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if _alibi(text):
        return "its positions are ALiBi biases along the row, which position_ids do not change"
    implementation = text._attn_implementation
    if implementation not in MASKED_ATTENTION and not is_kernel(implementation):
        return f"attention {implementation!r} takes no tree mask; load the model with attn_implementation='sdpa'"
    try:
        layer_kinds(text)
    except NotPackable as reason:
        return str(reason)
    backbone = backbone_of(inner)
    missing = {"input_ids", "attention_mask", "position_ids"} - inspect.signature(backbone.forward).parameters.keys()
    if missing:
        return f"{type(backbone).__name__} takes no {' and no '.join(sorted(missing))}"
    for name, module in backbone.named_modules():
        if isinstance(module, torch.nn.RNNBase) or (isinstance(module, torch.nn.Conv1d) and module.kernel_size != (1,)):
            return f"{name} ({type(module).__name__}) mixes neighbouring tokens without a mask"
    return _adapter_reason(model)


def plain_family(model: torch.nn.Module) -> bool:
    """Whether a model's family is known to have no limits on attention other than those that our masks implement."""
    inner = unwrap(model)
    config = inner.config.get_text_config()
    ours = type(inner).__module__.startswith("transformers.models.")
    return ours and config.model_type in PLAIN_FAMILIES and not unknown_limits(config)


def probe_length(model: torch.nn.Module, max_length: int | None) -> tuple[int | None, int | None]:
    """The sequence length that the probe must try, and the length up to which its result then holds.

    Args:
        model: causal language model, bare or wrapped.
        max_length: longest sequence to expect; None: unknown.

    Returns:
        The length to try in addition to the short one, None if the short one suffices; and the length up to which the result
        holds, None for any.
    """
    config = unwrap(model).config.get_text_config()
    if not plain_family(model):
        # A limit could take effect at any untried length, so the result holds only for what was tried.
        longest = max_length or min(getattr(config, "max_position_embeddings", None) or 1024, 1024)
        return longest, longest
    limits = [limit for kind in layer_kinds(config).values() for limit in (kind.window, kind.chunk) if limit]
    reached = [limit for limit in limits if max_length is None or limit < max_length]
    if not reached:
        return None, max_length if limits else None
    return (max(reached) + 32, None) if max_length is None else (max_length, max_length)


def unknown_limits(config) -> list[str]:
    """Settings whose names suggest a limit on attention that our masks do not implement."""
    return sorted(
        name
        for name, value in config.to_dict().items()
        if _LIMIT.search(name) and name not in _KNOWN_LIMITS and isinstance(value, int) and value > 1
    )


def caveats(model: torch.nn.Module) -> tuple[str, ...]:
    """Caveats about randomness in training: drawn once for a shared prompt, but twice in the padded path."""
    inner = unwrap(model)
    rates = [name for name, m in inner.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    config = inner.config.get_text_config()
    settings = [name for name in ("attention_dropout", "router_jitter_noise") if getattr(config, name, None)]
    if not rates and not settings:
        return ()
    what = ", ".join(settings + rates[:1])
    return (f"{what} is active: in training both answers of a pair see the same noise on the shared prompt",)


def _alibi(config) -> bool:
    attention = getattr(config, "attn_config", None)
    return bool(
        getattr(config, "alibi", False)
        or getattr(attention, "alibi", False)
        or getattr(config, "position_embedding_type", None) == "alibi"
    )


def _adapter_reason(model: torch.nn.Module) -> str | None:
    adapters = {}
    for layer in layers_around(model):
        adapters.update(getattr(layer, "peft_config", None) or {})
    for name, adapter in adapters.items():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind not in TOKENWISE_ADAPTERS:
            return f"adapter {name!r} is of kind {kind}, which is not known to act on each token by itself"
        if getattr(adapter, "alora_invocation_tokens", None):
            return f"adapter {name!r} starts at an invocation token (aLoRA), which packed rows hide"
    return None
