"""The ways to compute attention over packed pairs: what each one cannot do, and which of them a model gets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import segments, varlen
from .mask import layer_kinds
from .plan import NotPackable

DENSE, SEGMENTS, VARLEN = "dense", "segments", "varlen"
#: What a model may need of its attention beside causal softmax.
SOFTCAP, SINKS, CHUNKS, WINDOWS, DROPOUT, LARGE_HEADS = (
    "softcapping",
    "attention sinks",
    "chunks",
    "windows",
    "attention dropout",
    f"heads of more than {varlen.LARGEST_HEAD}",
)


@dataclass(frozen=True)
class BackEnd:
    """One way to compute attention over packed pairs.

    Attributes:
        name: the word for it in `attention=` and in the log.
        kernel: what computes it, for a model on sdpa.
        lacks: needs of a model that it cannot meet.
        implementation: the name that a model on sdpa is switched to; empty: the model stays on its own attention.
        attend: the attention function registered under that name; it takes a segment table as its mask, and any other mask
            as sdpa does. None: the model's attention takes a tree mask.
    """

    name: str
    kernel: str
    lacks: frozenset[str]
    implementation: str = ""
    attend: Callable | None = None

    @property
    def one_row(self) -> bool:
        """Whether it takes one row without filling and a segment table; else several rows and a tree mask."""
        return self.attend is not None


BACK_ENDS = {
    back_end.name: back_end
    for back_end in (
        BackEnd(
            VARLEN,
            "torch.nn.attention.varlen",
            frozenset([SOFTCAP, SINKS, CHUNKS, DROPOUT, LARGE_HEADS]),
            varlen.NAME,
            varlen.varlen_attention,
        ),
        BackEnd(SEGMENTS, "sdpa", frozenset([SOFTCAP, SINKS]), segments.NAME, segments.segment_attention),
        BackEnd(DENSE, "the model's own", frozenset()),
    )
}
_OURS = frozenset(b.implementation for b in BACK_ENDS.values() if b.implementation)
#: Implementations that take a tree mask: ours take it as sdpa does.
MASKED_ATTENTION = ("sdpa", "eager", *sorted(_OURS))


def back_end(name: str) -> BackEnd:
    """The back end of that name."""
    if name not in BACK_ENDS:
        raise ValueError(f"Got attention={name!r}; allowed are {', '.join(map(repr, sorted(BACK_ENDS)))}.")
    return BACK_ENDS[name]


@dataclass(frozen=True)
class Choice:
    """The back ends to try, best first, and why a better one is not among them (empty: there is none)."""

    names: tuple[str, ...]
    why: str = ""


def choose(
    implementation: str, needs: frozenset[str], device: str, capability: tuple[int, int] | None, dtype: torch.dtype
) -> Choice:
    """The back ends for a model that is not compiled.

    Args:
        implementation: the attention that the model was given.
        needs: what it needs of attention (`needs_of`).
        device: type of the device that it runs on.
        capability: CUDA's compute capability; None elsewhere.
        dtype: what its products are computed in.
    """
    if is_kernel(implementation):
        return Choice((VARLEN,))
    if implementation != "sdpa":
        return Choice((DENSE,))
    names = [SEGMENTS, DENSE]
    if device == "cuda" and capability is not None and capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16):
        names.insert(0, VARLEN)
    lacking = {name: sorted(needs & BACK_ENDS[name].lacks) for name in names}
    if VARLEN in names and varlen.varlen_attn is None:
        lacking[VARLEN] = ["this torch, which has no variable-length attention"]
    elif VARLEN in names and WINDOWS in needs and not varlen.does_windows():
        lacking[VARLEN] = ["windows in this torch"]
    left = [f"{name} cannot do {' and '.join(what)}" for name, what in lacking.items() if what]
    return Choice(tuple(name for name in names if not lacking[name]), "; ".join(left))


def choice_for(model: Any) -> Choice:
    """The back ends for a transformers model where it is now, under the autocast of this moment."""
    parameter = model.get_input_embeddings().weight
    device = parameter.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose(given_attention(model), needs_of(model), device.type, capability, product_dtype(model))


def product_dtype(model: Any) -> torch.dtype:
    """The dtype of a model's matrix products, under the autocast of this moment."""
    device = model.get_input_embeddings().weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def needs_of(model: Any) -> frozenset[str]:
    """What a transformers model needs of its attention."""
    config = model.config.get_text_config()
    kinds = layer_kinds(config).values()
    found = {
        SOFTCAP: bool(getattr(config, "attn_logit_softcapping", None)),
        SINKS: any("sinks" in module._parameters for module in model.modules()),
        CHUNKS: any(kind.chunk for kind in kinds),
        WINDOWS: any(kind.window for kind in kinds),
        DROPOUT: any(_attention_dropout(name, module) for name, module in model.named_modules()),
        LARGE_HEADS: _head_size(config) > varlen.LARGEST_HEAD,
    }
    return frozenset(need for need, is_there in found.items() if is_there)


def _head_size(config) -> int:
    """The largest size of a head that a configuration names."""

    def named(name: str) -> int:
        return getattr(config, name, None) or 0

    heads = named("num_attention_heads")
    given = [named("head_dim"), named("global_head_dim"), named("v_head_dim")]
    latent = named("qk_nope_head_dim") + named("qk_rope_head_dim")
    return max(*given, latent) or (named("hidden_size") // heads if heads else 0)


def _attention_dropout(name: str, module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.Dropout):
        return "att" in name.rpartition(".")[2] and module.p > 0
    rates = [vars(module).get("attention_dropout"), vars(module).get("attn_dropout")]
    if "Attention" in type(module).__name__:
        rates.append(vars(module).get("dropout"))
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)


def is_kernel(implementation: str) -> bool:
    """Whether a name is that of a flash kernel which transformers calls by its own function (or by ours, in its place)."""
    if "flash" not in implementation:
        return False
    from transformers import AttentionInterface

    ours = (varlen.flash_attention_of_transformers(), varlen.kernel_attention)
    return AttentionInterface().get(implementation) in ours


def kernel_of(model: Any, name: str) -> str:
    """What computes a model's attention over a back end, for the log."""
    given = given_attention(model)
    return given if is_kernel(given) or not back_end(name).one_row else back_end(name).kernel


def given_attention(model: Any) -> str:
    """The attention implementation that a model was given; ours count as sdpa, which they replace."""
    given = getattr(getattr(model, "config", None), "_attn_implementation", "")
    return "sdpa" if given in _OURS else given


def switch(model: Any, name: str) -> None:
    """Switches a transformers model to a back end's attention; calls with ordinary masks are computed as before.

    A model on a flash kernel stays on it: the function behind the kernel's name is replaced.

    Raises:
        NotPackable: the model is on another attention than the back end needs, or its attention cannot be switched.
    """
    from transformers import AttentionInterface

    wanted, given = back_end(name), given_attention(model)
    if wanted.attend is None or model.config._attn_implementation == wanted.implementation:
        return
    if name == VARLEN and is_kernel(given):
        AttentionInterface.register(given, varlen.kernel_attention)
        return
    _register(wanted.implementation, wanted.attend)
    if given != "sdpa" or not model._can_set_attn_implementation():
        raise NotPackable(f"{name} attention needs sdpa, and the model is on {given}")
    model.set_attn_implementation(wanted.implementation)
    if model.config._attn_implementation != wanted.implementation:
        raise NotPackable(f"the model does not accept {name} attention")


def switch_back(model: Any) -> None:
    """Switches a model back to sdpa after `switch`."""
    if model.config._attn_implementation in _OURS:
        model.set_attn_implementation("sdpa")


def _register(name: str, attend: Callable) -> None:
    """Registers an attention with transformers; with ordinary 2-D masks it is sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)


def takes(model: Any, name: str) -> bool:
    """Whether a model's attention is, at this moment, what a back end needs."""
    from transformers import AttentionInterface

    wanted, implementation = back_end(name), model.config._attn_implementation
    if not wanted.one_row:
        return implementation in MASKED_ATTENTION
    if name == VARLEN and AttentionInterface().get(implementation) is varlen.kernel_attention:
        return True
    return implementation == wanted.implementation
