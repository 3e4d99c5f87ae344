"""What a forward pass keeps for the backward pass, counted on fake tensors (shapes without data), for any architecture."""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .shape import is_target

#: Row lengths of the three counted forward passes. Bytes are at most quadratic in the length, so three suffice.
_LENGTHS = (32, 64, 128)


@dataclass(frozen=True)
class Kept:
    """Bytes that a part of the model keeps for backward: `once + rows · (linear · T + quadratic · T²)` for rows of T tokens.

    `once` counts the copies of weights that autocast makes; `quadratic` counts attention masks, and attention weights if
    they are kept.
    """

    once: float
    linear: float
    quadratic: float

    def padded(self, rows: int, tokens: float) -> float:
        """Bytes kept for padded rows, with their mask."""
        return self.once + rows * (self.linear * tokens + self.quadratic * tokens**2)

    def packed(self, tokens: float) -> float:
        """Bytes kept for one packed row, whose attention works by segments without a mask."""
        return self.once + self.linear * tokens


class _LikeLora(nn.Module):
    """A frozen linear layer with an adapter. It runs PEFT's operations, so it keeps what PEFT's layer keeps.

    With `spares`, what `trl_cpo._trl.lora_layers` leaves of it: an input that autocast would cast back is not cast.
    """

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype, spares: bool):
        super().__init__()
        self.spares = spares
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=dtype)

    def forward(self, x):
        result = self.base(x)
        if not (self.spares and torch.is_autocast_enabled("cpu") and x.dtype == torch.get_autocast_dtype("cpu")):
            x = x.to(self.down.weight.dtype)
        return result + self.up(self.down(x)) * 2.0


def kept_by(
    config: Any,
    *,
    dtype: torch.dtype,
    autocast: bool,
    lora: str | tuple[str, ...] = (),
    lora_dtype: torch.dtype = torch.float32,
    spares_casts: bool = False,
) -> tuple[Kept, Kept]:
    """What one block keeps for backward, and what the rest of the model without the head keeps.

    Builds the model with one block and with two, and runs both on fake tensors with rows of three lengths; the difference
    is one block's. If a model's blocks differ, all are taken to be like the second.

    Args:
        config: the model's transformers config.
        dtype: type of the weights.
        autocast: whether the model runs under bfloat16 autocast.
        lora: the linear layers that have adapters, as PEFT takes them; all else is frozen then. Empty: all is trained.
        lora_dtype: type of the adapters' weights.
        spares_casts: whether adapters leave out the casts that autocast takes back, as they do where pairs are packed.

    Raises:
        ValueError: the model cannot run on fake tensors, because its computation depends on values, as in mixtures of
            experts.
    """
    return _kept_by(config.to_json_string(), config, dtype, autocast, lora, lora_dtype, spares_casts)


class _Keyed:
    """A config as a cache key: equal to any config of the same text."""

    def __init__(self, text: str, config: Any):
        self.text, self.config = text, config

    def __hash__(self):
        return hash(self.text)

    def __eq__(self, other):
        return self.text == other.text


def _kept_by(text, config, *options):
    return _counted(_Keyed(text, config), *options)


@lru_cache(maxsize=64)
def _counted(keyed: _Keyed, *options) -> tuple[Kept, Kept]:
    one, two = ([_bytes_kept(_cut(keyed.config, layers), length, *options) for length in _LENGTHS] for layers in (1, 2))
    block = [b - a for a, b in zip(one, two, strict=True)]
    return _fit(block), _fit([a - b for a, b in zip(one, block, strict=True)])


def _fit(values: list[float]) -> Kept:
    """The parabola through the three counts."""
    powers = torch.tensor([[1.0, n, n * n] for n in _LENGTHS], dtype=torch.float64)
    once, linear, quadratic = torch.linalg.solve(powers, torch.tensor(values, dtype=torch.float64)).tolist()
    return Kept(max(once, 0.0), max(linear, 0.0), max(quadratic, 0.0))


def _cut(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [*kinds, kinds[-1]][-layers:]  # of a model of one block, that block twice
    return config


def _bytes_kept(config, tokens: int, dtype, autocast: bool, lora, lora_dtype, spares_casts: bool) -> float:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.train()
        if lora:
            model.requires_grad_(False)
            head = model.get_output_embeddings()
            for path, module in list(model.named_modules()):
                if isinstance(module, nn.Linear) and module is not head and is_target(path, lora):
                    parent, _, name = path.rpartition(".")
                    setattr(model.get_submodule(parent), name, _LikeLora(module, 8, lora_dtype, spares_casts))
        weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, tuple[int, Any]] = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that its address is not reused
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            try:
                output = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            except RuntimeError as error:
                raise ValueError(
                    f"cannot estimate what a {config.model_type} model keeps for backward: its computation depends on "
                    "the values in it, as in mixtures of experts, and no weights are loaded here."
                ) from error
        del output
        return float(sum(size for size, _ in kept.values()))
