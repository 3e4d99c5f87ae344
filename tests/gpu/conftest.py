"""The device, a place for measured numbers, and repeatable kernels."""

import json
import os

# cuBLAS reads it when CUDA starts; without it, deterministic algorithms are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from trl import DPOTrainer

from trl_cpo.engine.forward import varlen

from helpers.on_gpu import DEVICE, REHEARSAL, rehearsed

#: Absolute, because tests change the folder they are in.
LOG = os.environ.get("TRL_CPO_GPU_LOG") and os.path.abspath(os.environ["TRL_CPO_GPU_LOG"])


@pytest.fixture(scope="session", autouse=True)
def device():
    """Where everything runs."""
    if not REHEARSAL:
        yield DEVICE
        return
    with rehearsed():
        yield DEVICE


@pytest.fixture
def record(request, device):
    """Writes measured numbers: to the output, and as a line of JSON to the file that TRL_CPO_GPU_LOG names."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "rehearsal on the CPU"

    def write(**numbers) -> None:
        line = json.dumps({"test": request.node.nodeid.rpartition("/")[2], **numbers, "device": name}, default=str)
        print(line)
        if LOG:
            with open(LOG, "a") as file:
                file.write(line + "\n")

    return write


@pytest.fixture
def deterministic():
    """Kernels that give the same bits in every run; those that cannot raise an error."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unchecked():
    """Verdicts on kernels of this test are forgotten before and after it."""
    varlen._fault.cache_clear()
    yield
    varlen._fault.cache_clear()


@pytest.fixture
def no_model_cards(monkeypatch):
    """Half of what a tiny checkpoint costs, and no part of it."""
    monkeypatch.setattr(DPOTrainer, "create_model_card", lambda *_, **__: None)
