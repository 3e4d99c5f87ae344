"""Makes the CPU wait for the fake device in every way that there is, and prints what was seen, one a line."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from helpers.fake_device import FakeGPU


def waits() -> list[str]:
    gpu = FakeGPU()
    x, index = gpu.empty(torch.zeros(4, 3)), gpu.empty(torch.zeros(2, dtype=torch.long))
    on_cpu = torch.tensor([0, 1])
    with gpu:
        x.sum().item()
        bool((x > 0).any())
        x[:, 0].tolist()
        (x > 0).nonzero()
        x[x > 0]
        x[(x > 0).any(dim=1), 0]
        x[on_cpu]
        x.cpu()
        on_cpu.to(x.device)
        x[x > 0] = x.flatten()
        seen = [wait.kind for wait in gpu.waits]
        assert {(wait.file, wait.function) for wait in gpu.waits} == {("tests/processes/wait_on_fake_gpu.py", "waits")}
        gpu.waits.clear()
        # None of these waits.
        x[index], x.index_select(0, index), x[0], x[:, 1:], x.masked_fill(x > 0, 0.0), on_cpu.to(x.device, non_blocking=True)
        x[x > 0] = 0.0
        assert not gpu.waits, gpu.waits
    return seen


if __name__ == "__main__":
    print("\n".join(waits()))
