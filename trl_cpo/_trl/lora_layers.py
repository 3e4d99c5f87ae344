"""LoRA layers without the casts that autocast takes back.

PEFT casts the input of a LoRA layer to the type of its weights: float32 in mixed precision. Autocast casts it back to half
precision for the product. Half precision to float32 and back is the identity, forward and backward: without these casts
every bit stays, and a layer saves two kernels forward, two backward, and the copy that is kept for backward.

`_cast_input_dtype` is a private name of PEFT, and is not among those that `upstream` asks for: in a PEFT without it the
casts are done again, and nothing else changes.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear

#: Where autocast is known to cast the inputs of linear layers.
_DEVICES = ("cpu", "cuda")


def spare_casts(model: Any) -> None:
    """Lets the model's plain LoRA layers leave out casts that change nothing.

    Each call of a layer decides for itself, so this holds in checkpointing's recomputation too, and nothing has to be put
    back: where the casts do something, they are done.
    """
    for module in model.modules():
        if type(module) is Linear:
            # Not a method set on the module: it would refer to its own module, and the weights stay until garbage is collected.
            module.__class__ = SparingLinear


class SparingLinear(Linear):
    """PEFT's layer; only the casts are left out that autocast takes back."""

    def _cast_input_dtype(self, x, dtype):
        return x if _taken_back(self, x, dtype) else super()._cast_input_dtype(x, dtype)


def _taken_back(layer: Linear, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether autocast is all that sees the result of casting a layer's input to `dtype`."""
    device = x.device.type
    if dtype is not torch.float32 or device not in _DEVICES or not torch.is_autocast_enabled(device):
        return False
    if x.dtype is not torch.get_autocast_dtype(device):
        return False
    # A copy lies together in memory, and products over another layout may round in another order.
    if not x.is_contiguous() or x.storage_offset():
        return False
    # Read from the dictionaries: by attribute, as every layer asks, it takes longer than starting the casts.
    parts: dict[str, Any] = layer._modules
    downs, dropouts = parts["lora_A"]._modules, parts["lora_dropout"]._modules
    active = [name for name in layer.active_adapters if name in downs]
    # Several adapters share the cast, and their gradients are added in float32.
    if len(active) != 1 or active[0] in layer.lora_variant:
        return False
    down, dropout = downs[active[0]], dropouts[active[0]]
    # Dropout would scale in half precision. Only of torch's own layer is it known that autocast casts its input.
    return type(down) is torch.nn.Linear and (type(dropout) is torch.nn.Identity or not dropout.training)
