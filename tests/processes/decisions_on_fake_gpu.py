"""Runs the search of the demo's recipe on a device without memory; an operation on tensors of two devices ends it.

    python tests/processes/decisions_on_fake_gpu.py MODEL_FOLDER

The numbers are made up. One line of JSON: the steps that were measured.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch

from benchmarks import decisions
from trl_cpo.price.meter import PriceMeter

from helpers.fake_device import GPU, FakeGPU


def main(folder: str) -> None:
    gpu, records = FakeGPU(), []
    # Numbers go to the device by a copy, which this device sees.
    tensor, to = torch.tensor, torch.nn.Module.to
    torch.tensor = lambda data, device=None, **how: tensor(data, **how) if device is None else tensor(data, **how).to(device)
    torch.nn.Module.to = lambda module, *where, **how: gpu.moved(module) if where == (GPU,) else to(module, *where, **how)
    torch.gpu.get_rng_state, torch.gpu.set_rng_state = (lambda device: None), (lambda state, device: None)
    # A failed measurement says in one line why.
    PriceMeter._shared = lambda meter, items, work: (work(list(enumerate(items))), None)
    search = decisions.Search(folder, GPU)
    search.train, search.test = search.train[:8], search.test[:8]
    with gpu:
        search.run("start", {}, 0, (), records.append)
        search.run("penalty-1", {"target_modules": "all-linear", "sft": 0.3}, 0, (1, 2), records.append)
    print(json.dumps({"steps": [record["step"] for record in records]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
