"""How many digits a float32 product really has here."""

import torch
from accelerate import Accelerator

# What the older of PyTorch's two settings calls the same.
_NAMES = {"highest": "ieee", "high": "tf32", "medium": "bf16"}


def float32_products(device: str) -> str:
    """What matrix products of float32 are computed in on `device` ("cpu", "cuda", …): "ieee" (float32), "tf32" or "bf16".

    It is read where PyTorch keeps it, because not only `TrainingArguments.tf32` sets it: `torch_compile` does, and so does
    `torch.set_float32_matmul_precision` in anyone's script.
    """
    # Since PyTorch 2.9 there are two ways to set it, and after the newer one the older can no longer be read.
    if not hasattr(torch.backends, "fp32_precision"):
        return _NAMES[torch.get_float32_matmul_precision()]
    backend = torch.backends.mkldnn if device == "cpu" else torch.backends.cuda
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision  # "none": nobody has set it


def in_half_precision(model: torch.nn.Module, accelerator: Accelerator) -> bool:
    """Whether any part of a model is computed in fewer digits than float32's: half precision, TF32, 4 or 8 bits."""
    quantized = getattr(model, "is_quantized", False) or any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    coarse = float32_products(accelerator.device.type) != "ieee"
    return accelerator.mixed_precision != "no" or coarse or quantized or half
