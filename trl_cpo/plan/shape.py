"""The size of a model, counted on a model of its config without data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Bytes per weight of bitsandbytes' 4-bit layers: half a byte, and a float32 scale for each block of 64. Nested, the scales
#: take 8 bits, with a float32 for each 256.
NF4_BYTES = 0.5 + 4 / 64
NF4_NESTED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
INT8_BYTES = 1.0


@dataclass(frozen=True)
class Shape:
    """The size of a causal language model, in numbers of weights.

    Attributes:
        weights: all weights; tied ones count once.
        linears: (module path, in, out) of every linear layer except the head.
        head: weights of the output head.
        tied: whether the head is the embedding.
        layers: number of blocks.
        block: weights of the largest block.
        hidden, vocabulary: widths.
        query, key_value: width of a layer's queries and keys, over all heads.
    """

    weights: int
    linears: tuple[tuple[str, int, int], ...]
    head: int
    tied: bool
    layers: int
    block: int
    hidden: int
    vocabulary: int
    query: int
    key_value: int

    @cached_property
    def quantizable(self) -> int:
        """Weights that bitsandbytes quantizes: all linear layers except the head."""
        return sum(inside * outside for _, inside, outside in self.linears)

    def lora_weights(self, rank: int, targets: str | Sequence[str]) -> int:
        """Trainable weights of LoRA: `r (in + out)` for each target layer.

        Args:
            rank: r.
            targets: as PEFT takes them (`is_target`).

        Raises:
            ValueError: no linear layer is meant.
        """
        chosen = [(inside, outside) for path, inside, outside in self.linears if is_target(path, targets)]
        if not chosen:
            known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path, _, _ in self.linears}))
            if isinstance(targets, str):
                raise ValueError(
                    f"no linear layer has the path {targets}: PEFT takes one name alone for a pattern of the whole path. Give "
                    f"'.*{targets}' or several of {known}, or 'all-linear'."
                )
            raise ValueError(f"no linear layer is named {' or '.join(targets)}; choose from {known}, or 'all-linear'.")
        return sum(rank * (inside + outside) for inside, outside in chosen)


def is_target(path: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT gives the linear layer at a path an adapter.

    Args:
        targets: "all-linear", which leaves the head out; another text is a pattern of the whole path; several are names, the
            ends of paths.
    """
    if targets == "all-linear" or list(targets) == ["all-linear"]:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in targets)


def default_targets(model_type: str) -> str | tuple[str, ...]:
    """The layers to which PEFT gives adapters where none are named. Raises `ValueError` where PEFT refuses that too."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    if model_type not in known:
        raise ValueError(
            f"PEFT has no default layers for LoRA on a {model_type} model: name them, as in --lora_target_modules all-linear."
        )
    targets = known[model_type]
    return targets if isinstance(targets, str) else tuple(targets)


def empty_model(config: Any) -> "PreTrainedModel":
    """The model of a config on torch's meta device: shapes without data."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shape_of(config: Any) -> Shape:
    """Counts a model's weights from its config. Raises `ValueError` if transformers has no causal language model for it."""
    from transformers.pytorch_utils import Conv1D

    model, text = empty_model(config), config.get_text_config()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    linears = []
    for path, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            linears.append((path, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            linears.append((path, module.nx, module.nf))
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=_weights_of, default=nn.ModuleList())
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        weights=_weights_of(model),
        linears=tuple(linears),
        head=0 if head is None else head.weight.numel(),
        tied=head is not None and head.weight is embedding.weight,
        layers=len(blocks),
        block=max(map(_weights_of, blocks), default=0),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        query=width * heads,
        key_value=width * (getattr(text, "num_key_value_heads", None) or heads),
    )


def _weights_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
