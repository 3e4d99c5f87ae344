"""Running a model without side effects."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def evaluation_mode(*models: torch.nn.Module | None) -> Iterator[None]:
    """Sets evaluation mode without gradients; afterwards restores modes, buffers and all random states.

    Random states are those of torch (on the CPU and on the models' devices), NumPy and Python. A model that is None is
    skipped; a wrapped model (DDP, FSDP, DeepSpeed, PEFT) can be run as it is.
    """
    models = tuple(model for model in models if model is not None)
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    repacked = _repacked_layers(modules)
    restores = [snapshot(model) for model in models]
    states = random.getstate(), np.random.get_state()
    devices = {p.device for model in models for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.no_grad(), torch.random.fork_rng(sorted(device.index or 0 for device in devices), device_type=kind):
        try:
            for module in modules:
                module.training = False
            for module in repacked:
                module.support_avx512bf16_for_cpu = False
            yield
        finally:
            for module in repacked:
                module.support_avx512bf16_for_cpu = True
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for restore in restores:
                restore()
            random.setstate(states[0])
            np.random.set_state(states[1])


def keep_trainable(model: torch.nn.Module) -> None:
    """Prevents 4-bit layers from being repacked permanently at their first evaluation on a CPU with AVX512-BF16.

    bitsandbytes 0.50.2 repacks them for a kernel without a backward; after any evaluation a QLoRA run would continue with
    a gradient norm of zero. For models without such layers this does nothing, and on other devices it does not look for any:
    it is called with every pass of a reference.
    """
    if (weight := next(model.parameters(), None)) is not None and weight.device.type != "cpu":
        return
    for module in _repacked_layers(model.modules()):
        module.support_avx512bf16_for_cpu = False


def _repacked_layers(modules) -> list[torch.nn.Module]:
    """The modules that would be repacked (`keep_trainable`)."""
    return [module for module in modules if getattr(module, "support_avx512bf16_for_cpu", False)]


def snapshot(model: torch.nn.Module) -> Callable[[], None]:
    """Records the state that modules keep between calls, such as rotary frequencies that follow the longest sequence seen.

    Returns:
        A function that restores all buffers, and the numbers, strings and tensors stored beside them. Of large buffers
        (causal masks, quantized weights) it restores the reference only, not the contents: a copy would cost memory.
    """
    modules = [_Snapshot(module) for module in model.modules() if module._buffers]

    def restore() -> None:
        for module in modules:
            module.restore()

    return restore


class _Snapshot:
    """The buffers and plain attributes of one module."""

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

    def restore(self) -> None:
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
