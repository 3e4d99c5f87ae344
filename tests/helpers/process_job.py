"""Reads what a program of tests/processes is to do, and makes its process ready. To be imported before torch."""

import json
import os
import sys


def read_job() -> dict:
    """The job given as JSON on the command line, once DeepSpeed and FSDP2 are made to run on a CPU if its kind needs them."""
    job = json.loads(sys.argv[1])
    if job["kind"].startswith("zero"):
        import deepspeed

        # An operator for shared memory that would be compiled at first use; without it the same numbers come through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if job["kind"] == "fsdp2":
        # Accelerate shards only on the kinds of devices it takes for GPUs, and on others quietly runs plain DDP.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        import torch.distributed
        from accelerate.state import DistributedType, PartialState

        torch.distributed.init_process_group("gloo")
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    return job
