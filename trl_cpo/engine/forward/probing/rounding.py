"""The effect of rounding alone on a model's numbers: the yardstick for differences in low precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...precision import float32_products
from ..repack import backbone_of, unwrap

# Assumed for integer weights, which are usually multiplied in bfloat16.
_NARROW = torch.finfo(torch.bfloat16).eps
_FLOAT32_PRODUCTS = {"tf32": [torch.finfo(torch.float16).eps], "bf16": [_NARROW]}  # TF32 has float16's mantissa bits


@contextmanager
def watch_precision(model: torch.nn.Module) -> Iterator[Callable[[], float]]:
    """Yields a function that returns, after a run in the block, the epsilon of the lowest precision used; 0 for float32.

    Mixed precision is often switched on by a wrapper around the forward, so a hook inside the model looks for it.
    """
    parameters = list(unwrap(model).parameters())
    device = parameters[0].device.type
    steps = [_step(dtype) for dtype in {p.dtype for p in parameters}]
    steps += _FLOAT32_PRODUCTS.get(float32_products(device), [])

    def look(*_) -> None:
        if torch.is_autocast_enabled(device):
            steps.append(_step(torch.get_autocast_dtype(device)))

    hook = backbone_of(model).register_forward_pre_hook(look)
    try:
        yield lambda: max(steps)
    finally:
        hook.remove()


@contextmanager
def extra_rounding(model: torch.nn.Module, step: float, seed: int) -> Iterator[None]:
    """Within the block, perturbs the output of each innermost module of the backbone at random, by up to half a step.

    That is the least by which two correct computations may differ: sums in another order round to another neighbour.
    Rerunning the padded batch in another order is no substitute: on many machines it gives identical bits.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def shake(module, args, output):
        if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
            return None
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        off = torch.rand(output.shape, generator=generators[device], device=device) - 0.5
        return (output.float() * (1 + step * off)).to(output.dtype)

    # Modules with children count too if they hold weights themselves: a mixture's experts are often such a module.
    inner = [m for m in backbone_of(model).modules() if not m._modules or m._parameters]
    hooks = [module.register_forward_hook(shake) for module in inner]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _step(dtype: torch.dtype) -> float:
    if dtype in (torch.float32, torch.float64):
        return 0.0
    return torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else _NARROW
