"""Trainings in several processes: 4-bit weights, how a trained model is spread, and what a launcher asked for."""

import os

import torch
from transformers import BitsAndBytesConfig

from trl_cpo.engine.forward import PackedPairForward


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def forget_the_launchers_choices() -> None:
    """As torchrun would have started this process: Accelerate takes a JSON file beside a YAML file for a mistake."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def wrapping(trainer) -> dict:
    """How the trained model is spread over the processes, as seen from the model itself."""
    weights = list(trainer.model.parameters())
    return {
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "wrapper": type(trainer.model_wrapped).__name__,
        "zero_stage": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)(),
        "partitioned": sum(hasattr(w, "ds_id") for w in weights),
        "dtensors": sum(type(w.data).__name__ == "DTensor" for w in weights),
        "quantized": sum(type(w).__name__ == "Params4bit" for w in weights),
        "packed": isinstance(trainer._sharing.of(trainer.model_wrapped), PackedPairForward),
    }
