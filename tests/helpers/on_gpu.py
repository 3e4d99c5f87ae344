"""Where the tests of tests/gpu run: a CUDA device; or, to try those tests, the CPU over emulated kernels.

With TRL_CPO_GPU_REHEARSAL=1 they run on the CPU, which counts as such a device for the choice of attention and for its check.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from trl_cpo.engine.forward import backends, varlen

from helpers.flash_emulation import flash_on_cpu
from helpers.tiny import training_options

REHEARSAL = os.environ.get("TRL_CPO_GPU_REHEARSAL") == "1"
DEVICE = torch.device("cpu") if REHEARSAL else torch.device("cuda", 0)

#: Marks of every module of tests/gpu. What libraries warn of differs from device to device, and is shown and not an error.
ON_GPU = [
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA GPU, and this machine has none"),
    pytest.mark.filterwarnings("default", "ignore:.*will be removed in v6:FutureWarning", "ignore:constraint=:UserWarning"),
]


def some(cases: list) -> list:
    """All of them; in the rehearsal, which is there for the lines of the tests, the first and the last."""
    return [cases[0], cases[-1]] if REHEARSAL else cases


#: Parameters of a test: all weights, and an adapter, with which the rehearsal runs the lines for both.
LORA = pytest.mark.parametrize("lora", [True] if REHEARSAL else [False, True], ids=lambda lora: "lora" if lora else "full")


@contextmanager
def rehearsed() -> Iterator[None]:
    """Within the block, the CPU computes variable-length attention, is asked for it, and checks it."""
    choose = backends.choose
    with flash_on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "CHECKED", ("cpu",))
        patch.setattr(
            backends, "choose", lambda name, needs, device, capability, dtype: choose(name, needs, "cuda", (9, 0), dtype)
        )
        yield


def on_device(folder, **options) -> dict:
    """Training options for a few steps on the device, in TRL's precision: float32 weights under bfloat16 autocast."""
    return training_options(folder, **{"use_cpu": DEVICE.type == "cpu", "bf16": True, **options})


def random_states() -> list[torch.Tensor]:
    """Of the CPU and of the device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(DEVICE)] if DEVICE.type == "cuda" else [])]


def moved(inputs: dict) -> dict:
    """A batch on the device."""
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
