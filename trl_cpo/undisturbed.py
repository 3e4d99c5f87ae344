"""Running a model to look at it, without a trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards every module's mode and all random states (torch, numpy, Python) as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
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
            random.setstate(states[0])
            np.random.set_state(states[1])
