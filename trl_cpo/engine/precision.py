"""The precision in which a model is really computed."""

import torch
from accelerate import Accelerator

# Values of PyTorch's older setting, by the names of the newer one.
_NAMES = {"highest": "ieee", "high": "tf32", "medium": "bf16"}


def float32_products(device: str) -> str:
    """The precision of float32 matrix products on `device` ("cpu", "cuda", …): "ieee" (float32), "tf32" or "bf16".

    Reads PyTorch's own setting, because `TrainingArguments.tf32` is not the only way to change it: `torch_compile` does too,
    and so does `torch.set_float32_matmul_precision` in a user's script.
    """
    # Since PyTorch 2.9 there are two settings. Once the newer one is used, the older one cannot be read.
    if not hasattr(torch.backends, "fp32_precision"):
        return _NAMES[torch.get_float32_matmul_precision()]
    backend = torch.backends.mkldnn if device == "cpu" else torch.backends.cuda
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision  # "none": never set


def in_half_precision(model: torch.nn.Module, accelerator: Accelerator) -> bool:
    """Whether any part of a model is computed in lower precision than float32: half precision, TF32, 4 or 8 bits."""
    quantized = getattr(model, "is_quantized", False) or any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    coarse = float32_products(accelerator.device.type) != "ieee"
    return accelerator.mixed_precision != "no" or coarse or quantized or half
