"""Running a model to look at it, without a trace."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards modes, buffers and all random states (torch, numpy, Python) as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    put_back = noted(model)
    with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
        model.eval()
        for module, _ in modes:
            # A 4-bit layer of bitsandbytes that runs in evaluation on a CPU with AVX512-BF16 is packed anew for good,
            # for a kernel without a backward: training would go on without the gradients that pass through it.
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.training = True
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            put_back()
            random.setstate(states[0])
            np.random.set_state(states[1])


def noted(model: torch.nn.Module) -> Callable[[], None]:
    """Take down what modules note while they run, as rotary frequencies that grow with the longest sequence seen.

    Returns:
        What puts buffers, and the numbers, texts and tensors beside them, back as they are now. Large buffers (causal
        masks, quantized weights) are put back, but what is in them is not: keeping it would cost memory.
    """
    notes = [_Notes(module) for module in model.modules() if module._buffers]

    def put_back() -> None:
        for kept in notes:
            kept.put_back()

    return put_back


class _Notes:
    """The buffers of one module and the plain attributes beside them."""

    SMALL = 2**16

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.buffers = dict(module._buffers)
        self.fleeting = set(module._non_persistent_buffers_set)
        self.values = {
            name: buffer.detach().clone()
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_meta and buffer.numel() <= self.SMALL
        }
        self.attributes = {name: value for name, value in vars(module).items() if _plain(value)}

    def put_back(self) -> None:
        for name in [n for n, value in vars(self.module).items() if _plain(value) and n not in self.attributes]:
            delattr(self.module, name)
        self.module.__dict__.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        self.module._non_persistent_buffers_set.clear()
        self.module._non_persistent_buffers_set.update(self.fleeting)
        with torch.no_grad():
            for name, value in self.values.items():
                if not torch.equal(self.buffers[name], value):
                    self.buffers[name].copy_(value)


def _plain(value) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))
